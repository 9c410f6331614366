"""Constrained output: a JSON Schema, regex or grammar in, masks of the allowed next tokens out."""
