"""The program `gptj`: a local cluster, training, serving, predictions, model folders."""
