"""Ray Serve applications, one file a head."""
