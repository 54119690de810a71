"""Fine-tuning: data, training, and saving, behind the command `python -m phi4_mlx.lora`."""
