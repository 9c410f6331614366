"""Model folders with weights in 4 bits, made from those of any other."""
