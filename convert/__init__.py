"""The converter from Hugging Face checkpoints to MLX packages, installed as `phi4_mlx.convert`."""
