"""Training steps: losses, the optimizer, the loop, and its predicted memory."""
