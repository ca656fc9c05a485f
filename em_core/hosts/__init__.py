"""The diffusion-model protocol, implemented with the libraries that run the models."""
