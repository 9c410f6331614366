"""Import and export weights: Hugging Face, mesh-transformer-jax, Flax, TensorFlow."""
