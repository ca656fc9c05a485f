"""A run inside ComfyUI: memory, progress, interruption, and finding finished runs again."""
