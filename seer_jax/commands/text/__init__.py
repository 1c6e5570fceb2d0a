"""What commands that make text share."""
