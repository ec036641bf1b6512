"""``python -m ring_jax``: the same as the command ``ring-jax``."""

from ring_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
