"""The program `gptj`: a cluster on this machine, training, serving, predictions, model folders."""
