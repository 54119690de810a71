"""Scores of models: standard tasks through lm-eval, own tasks, and comparisons of two packages."""
