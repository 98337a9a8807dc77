"""What runs below the passes: grids of quantized weights, reduced visual sequences."""
