"""Several processes as one job: their launch, the side channel between them, and the watcher that ends them together."""
