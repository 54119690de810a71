"""The HTTP server: OpenAI's and Anthropic's APIs, and the chat page."""
