"""Write, verify, cache and read model folders."""
