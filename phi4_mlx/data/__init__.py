"""Data sets: files of conversations, prompts and texts, read into samples of token ids."""
