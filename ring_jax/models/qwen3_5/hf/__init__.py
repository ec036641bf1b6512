"""Checkpoint files of Hugging Face: which tensor is which parameter, reading and writing them."""
