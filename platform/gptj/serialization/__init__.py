"""JSON and YAML, as strictly as settings and files of ours need them."""
