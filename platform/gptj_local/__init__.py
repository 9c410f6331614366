"""S3 and Ray on loopback, for the quickstart, benchmarks and tests."""
