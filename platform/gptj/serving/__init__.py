"""What the deployments share: request and reply types, errors, keys, batching."""
