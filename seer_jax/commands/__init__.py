"""The command line, one file per command. Library code imports none of it."""
