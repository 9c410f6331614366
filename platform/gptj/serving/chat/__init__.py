"""OpenAI's chat API."""
