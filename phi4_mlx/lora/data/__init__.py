"""Training data: files to samples, samples to batches."""
