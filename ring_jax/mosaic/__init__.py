"""What every Mosaic GPU kernel shares, attention or not: jax versions, updates in place, matrix products as PTX."""
