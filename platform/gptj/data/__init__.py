"""Rows of text in, packed batches of token ids out."""
