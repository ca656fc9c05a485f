"""The protocol over the libraries that run the models."""
