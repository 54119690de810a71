"""Speech to text: sound of any length in parts, the parts through a model, their text in the formats of others."""
