"""Several processes as one job: their launch, the side channel between them, and the watchers that end it."""
