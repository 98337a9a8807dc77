"""What runs below the passes: grids of quantized weights, rounded inputs, reduced visual sequences."""
