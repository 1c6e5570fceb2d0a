"""The command line, a file per command. No library code imports it."""
