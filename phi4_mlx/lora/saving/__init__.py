"""A run on the disk: its folder, checkpoints and metrics."""
