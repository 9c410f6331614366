"""What the jobs share: their command lines, and their use of Ray."""
