"""Checkpoints as trainers and quantizers leave them, read as Hugging Face's tensors; nothing is written."""
