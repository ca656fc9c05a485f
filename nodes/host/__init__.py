"""The diffusion-model protocol of em_core over ComfyUI's MODEL, CLIP and VAE."""
