"""What `jobs/benchmark.py` measures, one file a subject."""
