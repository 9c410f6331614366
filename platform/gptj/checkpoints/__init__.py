"""Model folders: written, verified, cached, read."""
