"""What all measurements share: the clock, the check of results, the written record."""
