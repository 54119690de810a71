"""Text and messages to token ids and back: tokenizers and chat formats."""
