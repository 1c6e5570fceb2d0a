"""From gate scores to lists of key blocks."""
