"""The diffusion-model protocol of em_core implemented with ComfyUI's MODEL, CLIP and VAE."""
