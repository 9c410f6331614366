"""Strict JSON and YAML for settings and our own files."""
