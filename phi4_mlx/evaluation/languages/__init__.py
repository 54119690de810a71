"""The 23 languages of Phi-4-mini: the tokens that each costs, and whether a model answers in the one it is asked in."""
