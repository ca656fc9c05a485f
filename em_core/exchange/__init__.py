"""Learned concepts in the files of other programs, and theirs as concepts: LoRAs and embeddings."""
