"""Flash attention on Hopper GPUs, in Pallas Mosaic GPU: launches (pads, tables, grids) and the kernels that they start."""
