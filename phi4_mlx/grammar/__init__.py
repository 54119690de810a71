"""Grammars from JSON schemas and tools, and the constraint that holds one answer to a grammar."""
