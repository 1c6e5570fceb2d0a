"""What goes wrong in a command, as one line in the words of its command line."""
