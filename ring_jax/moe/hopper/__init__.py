"""Grouped products of experts for Hopper GPUs, in Pallas Mosaic GPU."""
