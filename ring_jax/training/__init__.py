"""What training needs beside a model and its loss: `ring_jax.training.checkpoint` (Orbax)."""
