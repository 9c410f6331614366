"""Weights of other programs in and out: Hugging Face, mesh-transformer-jax, Flax, TensorFlow."""
