"""The command line: words in, calls and tables out."""
