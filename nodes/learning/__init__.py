"""Runs inside ComfyUI: memory, progress, interruption, and reuse of finished runs."""
