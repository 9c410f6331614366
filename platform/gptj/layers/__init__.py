"""Layers beyond PyTorch's, and the functions that they compute."""
