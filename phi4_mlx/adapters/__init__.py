"""LoRA and DoRA layers, and adapter folders in mlx-lm's layout and PEFT's."""
