"""The server: `python -m phi4_mlx.server --model M`."""
