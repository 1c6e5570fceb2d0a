"""Code that Mosaic GPU kernels share."""
