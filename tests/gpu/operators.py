"""What a step is made of, one by one: products, sampling, attention, copies of pages."""

from __future__ import annotations

import attention
import products
import sampling
from checking import Check, run


def main(check: Check) -> None:
    for measure in (sampling.measure, attention.measure, products.measure):
        with check.attempt(measure.__module__):
            measure(check)


if __name__ == "__main__":
    run(main)
