"""What Mosaic GPU kernels share."""
