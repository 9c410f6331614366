"""API keys: names, permissions and limits."""
