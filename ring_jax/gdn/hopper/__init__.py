"""The gated delta rule on Hopper GPUs, in Pallas Mosaic GPU."""
