"""The terminal: shared command-line options, the screen, the line editor and Markdown."""
