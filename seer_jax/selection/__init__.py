"""Which key blocks attention reads: contexts, scorers, rules and policies."""
