"""Linear maps of few vectors with weights that are stacked over layers."""
