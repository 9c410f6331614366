"""Entry points for `ray job submit`, and the programs around them."""
