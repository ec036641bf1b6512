"""Products of few rows on Hopper GPUs, in Pallas Mosaic GPU."""
