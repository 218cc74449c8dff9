"""Torch and Hugging Face files to params and back: the only package here that imports torch."""
