"""API keys: names, what each may use, and how much."""
