"""Training data: documents, tokens, packed rows, batches."""
