"""The cache store: prompt caches in a folder, which outlive the process and are found again by their tokens."""
