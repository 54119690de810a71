"""config.json -> one frozen, complete config a model kind, before any weight exists."""
