"""The converter: a Hugging Face checkpoint goes in, a package for MLX comes out. Installed as `phi4_mlx.convert`."""
