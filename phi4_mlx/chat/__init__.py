"""The chat in a terminal: `python -m phi4_mlx.chat`."""
