"""How the demo model was trained: data, autoencoder, denoiser, sample sheet."""
