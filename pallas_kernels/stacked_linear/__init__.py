"""Linear layers of a decoder whose weights are stacked over layers, for few tokens."""
