"""The kernel that draws tokens, launched by `sampling`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def least_kept(
    weights, SIZE: tl.constexpr, low, high, target, COUNTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The least bits of a weight such that what is above is less than the target.

    Weights are not negative, so that their order is that of their bits. Each pass over the row
    divides the bits between low (excluded) and high by four.

    Args:
        COUNTS: whether to count the weights above, or to add them up.
    """
    while high - low > 1:
        quarter = tl.maximum((high - low) // 4, 1)
        first = low + quarter
        second = tl.minimum(first + quarter, high)
        third = tl.minimum(second + quarter, high)
        beyond_first = tl.zeros([BLOCK], tl.float32)
        beyond_second = tl.zeros([BLOCK], tl.float32)
        beyond_third = tl.zeros([BLOCK], tl.float32)
        for start in range(0, SIZE, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            weight = tl.load(weights + columns, mask=columns < SIZE, other=0.0)
            bits = weight.to(tl.int32, bitcast=True)
            worth = tl.where(columns < SIZE, 1.0, 0.0) if COUNTS else weight
            beyond_first += tl.where(bits > first, worth, 0.0)
            beyond_second += tl.where(bits > second, worth, 0.0)
            beyond_third += tl.where(bits > third, worth, 0.0)
        above_first = tl.sum(beyond_first, axis=0)
        above_second = tl.sum(beyond_second, axis=0)
        above_third = tl.sum(beyond_third, axis=0)
        if above_first < target:
            high = first
        elif above_second < target:
            low = first
            high = second
        elif above_third < target:
            low = second
            high = third
        else:
            low = third
    return high


@triton.jit
def draw(
    logits,  # (R, V)
    rows,  # (D)
    temperatures,  # (D)
    top_k,  # (D)
    top_p,  # (D)
    min_p,  # (D)
    uniforms,  # (D)
    weights,  # (D, V): probabilities relative to the likeliest token's
    tokens,  # (D)
    stride,  # of the logits' rows
    SIZE: tl.constexpr,  # V
    BLOCK: tl.constexpr,
    DRAW_BLOCK: tl.constexpr,
):
    """One program per row."""
    number = tl.program_id(0).to(tl.int64)
    logits += tl.load(rows + number) * stride
    weights += number * SIZE
    temperature = tl.load(temperatures + number)
    largest = -float("inf")
    for start in range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + columns, mask=columns < SIZE, other=-float("inf"))
        largest = tl.maximum(largest, tl.max(logit, axis=0))
    total = 0.0
    for start in range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + columns, mask=columns < SIZE, other=-float("inf"))
        weight = tl.exp((logit - largest) / temperature)
        tl.store(weights + columns, weight, mask=columns < SIZE)
        total += tl.sum(weight, axis=0)
    tl.debug_barrier()  # other threads of the program read these weights
    low = -1
    high = 0x3F800000  # of 1, the largest weight
    least = 0
    kept = tl.load(top_k + number)
    if (kept > 0) & (kept < SIZE):
        least = least_kept(weights, SIZE, low, high, kept.to(tl.float32), True, BLOCK)
        total = 0.0
        for start in range(0, SIZE, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            weight = tl.load(weights + columns, mask=columns < SIZE, other=0.0)
            total += tl.sum(tl.where(weight.to(tl.int32, bitcast=True) >= least, weight, 0.0))
    share = tl.load(top_p + number)
    if share < 1:
        least = least_kept(weights, SIZE, least - 1, high, share * total, False, BLOCK)
    least = tl.maximum(least, tl.load(min_p + number).to(tl.int32, bitcast=True))
    sum_kept = tl.zeros([], tl.float64)
    for start in range(0, SIZE, DRAW_BLOCK):
        columns = start + tl.arange(0, DRAW_BLOCK)
        weight = tl.load(weights + columns, mask=columns < SIZE, other=0.0)
        weight = tl.where(weight.to(tl.int32, bitcast=True) >= least, weight, 0.0)
        sum_kept += tl.sum(weight, axis=0).to(tl.float64)
    wanted = tl.load(uniforms + number) * sum_kept
    # The block in which the sum exceeds the number, and if rounding hides it the last with any.
    found = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.float64)
    reached = tl.zeros([], tl.float64)
    for start in range(0, SIZE, DRAW_BLOCK):
        columns = start + tl.arange(0, DRAW_BLOCK)
        weight = tl.load(weights + columns, mask=columns < SIZE, other=0.0)
        weight = tl.where(weight.to(tl.int32, bitcast=True) >= least, weight, 0.0)
        part = tl.sum(weight, axis=0).to(tl.float64)
        if (reached <= wanted) & (part > 0):
            found = start
            before = reached
        reached += part
    columns = found + tl.arange(0, DRAW_BLOCK)
    weight = tl.load(weights + columns, mask=columns < SIZE, other=0.0)
    weight = tl.where(weight.to(tl.int32, bitcast=True) >= least, weight, 0.0).to(tl.float64)
    beyond = (before + tl.cumsum(weight, axis=0) > wanted) & (weight > 0)
    token = tl.min(tl.where(beyond, columns, SIZE), axis=0)
    last = tl.max(tl.where(weight > 0, columns, 0), axis=0)
    tl.store(tokens + number, tl.where(token < SIZE, token, last).to(tl.int64))
