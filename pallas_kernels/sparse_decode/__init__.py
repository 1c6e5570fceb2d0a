"""One new token per sequence, attending to a list of key blocks."""
