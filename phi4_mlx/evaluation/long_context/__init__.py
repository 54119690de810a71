"""Retrieval from long prompts: needles, chains and counts by length and depth, in 23 languages."""
