"""Weights in files: Hugging Face folders, safetensors, PyTorch zips, EasyLM streams; nothing is executed."""
