"""Whole models on top of the layers: `ring_jax.models.qwen3_5`."""
