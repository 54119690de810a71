"""`generate --prompts`: the answers to a file of prompts, on one machine or shared out among several."""
