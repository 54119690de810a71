"""Grammars from JSON schemas and tools, and the constraint that makes one answer obey a grammar."""
