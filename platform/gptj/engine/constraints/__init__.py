"""Constrained output: a JSON Schema, a regex or a grammar in, the tokens that may come next out."""
