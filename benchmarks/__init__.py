"""Each module here measures one thing and prints it; the last line of its output is JSON."""
