"""The public place of `next_token_loss`; the code is in `phi4_mlx.lora.training.loss`."""

from phi4_mlx.lora.training.loss import next_token_loss

__all__ = ["next_token_loss"]
