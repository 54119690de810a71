"""Evaluation of models: scores of texts, answers to questions, and the tasks that are made of them."""
