"""The training loop: settings, steps, evaluation, checkpoints and resume."""
