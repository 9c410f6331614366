"""Products with weights in 8 and 4 bits, launched by `quantized_linear`.

Words of weights are as `quantized_matrix` packs them: 16 words of 32 bits are a block, and plane p
of a block, which is the p-th byte or nibble of its words, has 16 inputs one after another. So each
plane is multiplied by consecutive inputs, and no weight moves to another thread.

Integers become floats without conversions, which are slow on most GPUs: their bits are moved into
a float's mantissa.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORDS = tl.constexpr(16)  # of a block
QUAD = tl.constexpr(4)  # words that a thread loads together: 16 bytes


@triton.jit
def shifted(words, PART: tl.constexpr):
    """Move byte PART of the words to the upper 8 of a float's 23 bits of mantissa."""
    if PART < 2:
        return words << (15 - 8 * PART)
    else:
        return words >> (8 * PART - 15)


@triton.jit(do_not_specialize=["one"])
def multiply_row(
    x,  # (inputs)
    words,  # (columns, BLOCKS, WORDS), int32
    scales,  # (columns): fp32, or of each block two in bf16, as int32
    product,  # (columns)
    columns,
    inputs,
    one,  # bits of 1.0
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_QUADS: tl.constexpr,
):
    """GEMV, memory-bound: one program per BLOCK_COLUMNS columns.

    A byte n becomes 1 + n / 256. Of two nibbles, after one shift, the upper one becomes 1 + n / 16,
    the lower one 1 + n / 256, and its input is multiplied by 16. What the ones and the zero points
    add to a sum depends on x alone. `one` is an argument, since instructions can have one constant:
    the mask.
    """
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    real = column < columns
    numbers = tl.arange(0, BLOCK_QUADS)
    inside = tl.arange(0, QUAD)
    PLANES: tl.constexpr = 32 // BITS
    QUADS: tl.constexpr = BLOCKS * (WORDS // QUAD)
    sums = tl.zeros([BLOCK_COLUMNS, BLOCK_QUADS], tl.float32)
    for first in tl.range(0, QUADS, BLOCK_QUADS):
        quad = first + numbers
        loaded = real[:, None] & (quad < QUADS)[None, :]
        places = (column * (QUADS * QUAD))[:, None] + (quad * QUAD)[None, :]
        packed = tl.load(
            words + places[:, :, None] + inside[None, None, :], mask=loaded[:, :, None], other=0
        )
        block = quad // (WORDS // QUAD)
        place = block * (PLANES * WORDS) + quad % (WORDS // QUAD) * QUAD
        places_of_x = place[:, None] + inside[None, :]
        if BITS == 4:
            places = (column * BLOCKS)[:, None] + block[None, :]
            pair = tl.load(scales + places, mask=loaded, other=0)
        for group in tl.static_range(PLANES // 4):
            at = places_of_x + 4 * group * WORDS
            x0 = plane_of(x, at, inputs)
            x1 = plane_of(x, at + WORDS, inputs)
            x2 = plane_of(x, at + 2 * WORDS, inputs)
            x3 = plane_of(x, at + 3 * WORDS, inputs)
            if BITS == 8:
                start = -1.5 * (x0 + x1 + x2 + x3)
            else:
                x0 *= 16
                x2 *= 16
                start = -1.5 * (x1 + x3) - (1 + 8 / 256) * (x0 + x2)
            total = float_of(packed, one, 4 * group, BITS) * x0[None, :, :] + start[None, :, :]
            total += float_of(packed, one, 4 * group + 1, BITS) * x1[None, :, :]
            total += float_of(packed, one, 4 * group + 2, BITS) * x2[None, :, :]
            total += float_of(packed, one, 4 * group + 3, BITS) * x3[None, :, :]
            if BITS == 8:
                sums += tl.sum(total, axis=2)
            else:
                sums += scale_of(pair, group) * tl.sum(total, axis=2)
    found = tl.sum(sums, axis=1)
    if BITS == 8:
        found *= 256 * tl.load(scales + column, mask=real, other=0.0)
    else:
        found *= 16
    tl.store(product + column, found.to(product.dtype.element_ty), mask=real)


@triton.jit
def plane_of(x, places, inputs):
    return tl.load(x + places, mask=places < inputs, other=0.0).to(tl.float32)


@triton.jit
def float_of(words, one, PLANE: tl.constexpr, BITS: tl.constexpr):
    """A plane's bits in a float's mantissa: numbers in [1, 2), or subnormal ones if `one` is 0."""
    if BITS == 8:
        bits = shifted(words, PLANE) & 0x7F8000
    elif PLANE % 2 == 1:
        bits = shifted(words, PLANE // 2) & 0x780000
    else:
        bits = shifted(words, PLANE // 2) & 0x078000
    return (bits | one).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(pair, GROUP: tl.constexpr):
    """One of two bf16 numbers, the first in the lower half of a word, in fp32."""
    bits = pair << 16 if GROUP == 0 else pair & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def weights_of(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    """The weights of a plane, in units of 128 scales: fp32, and exact in fp16 and bf16.

    A byte or nibble is the mantissa of a subnormal number, which a product makes a normal one.
    """
    bits = float_of(words, 0, PLANE, BITS)
    if BITS == 8:
        return bits * 2.0**127 - 1.0
    elif PLANE % 2 == 1:
        return bits * 2.0**123 - 0.0625
    else:
        return bits * 2.0**127 - 0.0625


@triton.jit(do_not_specialize=["rows", "blocks", "blocks_a_split"])
def multiply_rows(
    x,  # (rows, inputs)
    words,  # (columns, blocks, WORDS), int32
    scales,  # (columns): fp32, or of each block two in bf16, as int32
    product,  # (splits, rows, columns), fp32 with several splits
    rows,
    columns,
    inputs,
    blocks,
    blocks_a_split,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether the inputs fill all blocks
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """GEMM with fp32 sums: a program per BLOCK_ROWS rows, BLOCK_COLUMNS columns and split.

    Weights are the left factor: Hopper's products read that one from registers.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = tl.program_id(2) * blocks_a_split
    last = tl.minimum(first + blocks_a_split, blocks)
    real = column < columns
    real_row = (row < rows)[None, :]
    rows_of_x = x + row[None, :] * inputs
    word = tl.arange(0, WORDS)
    PLANES: tl.constexpr = 32 // BITS
    sums = tl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        places = (column * blocks + block) * WORDS
        packed = tl.load(words + places[:, None] + word[None, :], mask=real[:, None], other=0)
        if BITS == 4:
            pair = tl.load(scales + column * blocks + block, mask=real, other=0)
        for plane in tl.static_range(PLANES):
            at = (block * PLANES + plane) * WORDS + word
            seen = real_row if WHOLE else real_row & (at < inputs)[:, None]
            values = tl.load(rows_of_x + at[:, None], mask=seen, other=0.0)
            weights = weights_of(packed, plane, BITS).to(values.dtype)
            if BITS == 8:
                sums = tl.dot(weights, values, sums)
            else:
                if plane % 4 == 0:
                    total = tl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
                total = tl.dot(weights, values, total)
                if plane % 4 == 3:
                    sums += total * scale_of(pair, plane // 4)[:, None]
    if BITS == 4:
        sums *= 128
    else:
        sums *= 128 * tl.load(scales + column, mask=real, other=0.0)[:, None]
    target = product + (tl.program_id(2) * rows + row)[None, :] * columns + column[:, None]
    tl.store(target, sums.to(product.dtype.element_ty), mask=real[:, None] & real_row)


@triton.jit
def add_splits(
    parts,  # (SPLITS, size), fp32
    product,  # (size)
    size,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of the splits, always in the same order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * size + place, mask=inside, other=0.0)
    tl.store(product + place, total.to(product.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["columns", "blocks"])
def dequantize(
    words,  # (columns, blocks, WORDS), int32
    scales,  # (columns): fp32, or of each block two in bf16, as int32
    weight,  # (columns, inputs)
    columns,
    inputs,
    blocks,
    BITS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """One program per BLOCK_COLUMNS columns and BLOCK_WORDS of their words."""
    column = (tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[:, None]
    number = (tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS))[None, :]
    block = number // WORDS
    real = column < columns
    inside = real & (block < blocks)
    packed = tl.load(words + column * blocks * WORDS + number, mask=inside, other=0)
    PLANES: tl.constexpr = 32 // BITS
    if BITS == 4:
        pair = tl.load(scales + column * blocks + block, mask=inside, other=0)
    else:
        scale = tl.load(scales + column, mask=real, other=0.0) * 128
    for plane in tl.static_range(PLANES):
        if BITS == 4:
            scale = scale_of(pair, plane // 4) * 128
        value = weights_of(packed, plane, BITS) * scale
        at = (block * PLANES + plane) * WORDS + number % WORDS
        tl.store(
            weight + column * inputs + at,
            value.to(weight.dtype.element_ty),
            mask=inside & (at < inputs),
        )
