"""Runners: compute a step's logits on each kind of device."""
