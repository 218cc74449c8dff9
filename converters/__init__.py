"""Checkpoint files of other libraries to params and back: the only package here that imports torch."""
