"""What few windows and prompts say about all text: intervals, and the share of the blocks that a target needs."""
