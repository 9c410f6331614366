"""A step's operations as Triton kernels, launched by `launch`.

Sums, norms, rotary embedding and softmax are in fp32. Exponentials use exp2, with scores scaled
accordingly. Names in capitals are compile-time constants; BLOCK_… is the next power of two, as
Triton's ranges require. A cache in fp8 (e4m3) has scales; of other caches they are None, and what
is compiled does without them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptj.engine.runners.cuda.fp8 import LEAST

FP8_LEAST = tl.constexpr(LEAST)


@triton.jit
def add_and_norm(
    x,  # (T, WIDTH), fp32, changed in place
    added,  # (T, WIDTH)
    row_scales,  # (T) and
    column_scales,  # (WIDTH), fp32, of `added`; or None
    added_bias,  # (WIDTH), fp32
    weight,  # (WIDTH), fp32
    bias,
    normed,  # (T, WIDTH)
    epsilon,
    ADDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """One program per token."""
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    places = tl.program_id(0).to(tl.int64) * WIDTH + columns
    row = tl.load(x + places, mask=inside, other=0.0)
    if ADDS:
        more = tl.load(added + places, mask=inside, other=0.0).to(tl.float32)
        if row_scales is not None:
            more *= tl.load(row_scales + tl.program_id(0))
            more *= tl.load(column_scales + columns, mask=inside, other=0.0)
        row += more
        row += tl.load(added_bias + columns, mask=inside, other=0.0)
        tl.store(x + places, row, mask=inside)
    mean = tl.sum(row, axis=0) / WIDTH
    centred = tl.where(inside, row - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + epsilon)
    weights = tl.load(weight + columns, mask=inside, other=0.0)
    biases = tl.load(bias + columns, mask=inside, other=0.0)
    values = centred * scale * weights + biases
    tl.store(normed + places, values.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def fp8_scale(x):
    """The scale of x (N), and its inverse: see `fp8.scales_for`."""
    largest = tl.max(tl.abs(x), axis=0)
    # The biased exponent, plus 1 if the significand exceeds 448's (1.75), minus 448's exponent, 8.
    bits = tl.maximum(largest, FP8_LEAST).to(tl.int32, bitcast=True)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest < float("inf"), scale, float("nan")), inverse


@triton.jit
def rope_and_cache(
    qkv_fc_in,  # (T, 3 * HEADS * HEAD_DIM + INNER)
    row_scales,  # (T) and
    column_scales,  # (3 * HEADS * HEAD_DIM + INNER), fp32, of qkv_fc_in; or None
    inner_bias,  # (INNER), fp32
    sines,  # (positions, ROTATED / 2), fp32
    cosines,
    positions,  # (T)
    slots,  # (T)
    queries,  # (T, HEADS, HEAD_DIM)
    keys,  # (pages, HEADS, PAGE_SIZE, HEAD_DIM)
    values,
    key_scales,  # (pages, HEADS, PAGE_SIZE), fp32, or None
    value_scales,
    attn_mlp,  # (T, HEADS * HEAD_DIM + INNER)
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Per token, one program per head and per BLOCK_INNER inner values."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    width = HEADS * HEAD_DIM
    source = qkv_fc_in + token * (3 * width + INNER)
    if part < HEADS:
        dims = tl.arange(0, BLOCK_DIM)
        inside = dims < HEAD_DIM
        turned = dims < ROTATED
        position = tl.load(positions + token)
        angles = position * (ROTATED // 2) + dims // 2
        cosine = tl.load(cosines + angles, mask=turned, other=1.0)
        sine = tl.load(sines + angles, mask=turned, other=0.0)
        # (x0, x1) becomes (x0 cos - x1 sin, x1 cos + x0 sin).
        signed = tl.where(dims % 2 == 0, -sine, sine)
        head = source + part * HEAD_DIM
        q = tl.load(head + dims, mask=inside, other=0.0).to(tl.float32)
        q_beside = tl.load(head + (dims ^ 1), mask=turned, other=0.0).to(tl.float32)
        k = tl.load(head + width + dims, mask=inside, other=0.0).to(tl.float32)
        k_beside = tl.load(head + width + (dims ^ 1), mask=turned, other=0.0).to(tl.float32)
        v = tl.load(head + 2 * width + dims, mask=inside, other=0.0)
        if row_scales is not None:
            row_scale = tl.load(row_scales + token)
            scales = column_scales + part * HEAD_DIM
            q *= row_scale * tl.load(scales + dims, mask=inside, other=0.0)
            q_beside *= row_scale * tl.load(scales + (dims ^ 1), mask=turned, other=0.0)
            scales += width
            k *= row_scale * tl.load(scales + dims, mask=inside, other=0.0)
            k_beside *= row_scale * tl.load(scales + (dims ^ 1), mask=turned, other=0.0)
            scales += width
            v = v.to(tl.float32) * row_scale * tl.load(scales + dims, mask=inside, other=0.0)
        q = (q * cosine + q_beside * signed).to(queries.dtype.element_ty)
        k = k * cosine + k_beside * signed
        tl.store(queries + token * width + part * HEAD_DIM + dims, q, mask=inside)
        slot = tl.load(slots + token)
        page = (slot // PAGE_SIZE).to(tl.int64)
        place = (page * HEADS + part) * PAGE_SIZE + slot % PAGE_SIZE
        if key_scales is not None:
            v = v.to(tl.float32)
            k_scale, k_inverse = fp8_scale(k)
            v_scale, v_inverse = fp8_scale(v)
            k *= k_inverse
            v *= v_inverse
            tl.store(key_scales + place, k_scale)
            tl.store(value_scales + place, v_scale)
        place *= HEAD_DIM
        tl.store(keys + place + dims, k.to(keys.dtype.element_ty), mask=inside)
        tl.store(values + place + dims, v.to(values.dtype.element_ty), mask=inside)
    else:
        columns = (part - HEADS) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
        within = columns < INNER
        x = tl.load(source + 3 * width + columns, mask=within, other=0.0).to(tl.float32)
        if row_scales is not None:
            x *= tl.load(row_scales + token)
            x *= tl.load(column_scales + 3 * width + columns, mask=within, other=0.0)
        x += tl.load(inner_bias + columns, mask=within, other=0.0)
        # gelu_new: x / 2 * (1 + tanh(u)) is x * sigmoid(2 u).
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        target = attn_mlp + token * (width + INNER) + width + columns
        tl.store(target, x.to(attn_mlp.dtype.element_ty), mask=within)


@triton.jit
def attend(q, k, v, visible, scale, largest, total, weighted, MASKED: tl.constexpr):
    """Attend to some more places: the sums of online softmax after them.

    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(visible, scores, -float("inf"))
    raised = tl.maximum(largest, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - raised[:, None])
    shrink = tl.exp2(largest - raised)
    total = total * shrink + tl.sum(weights, axis=1)
    weighted = weighted * shrink[:, None]
    weighted = tl.dot(weights.to(v.dtype), v, weighted, input_precision="ieee")
    return raised, total, weighted


@triton.jit
def attend_fp8(
    q,
    k,
    v,
    k_scales,
    v_scales,
    visible,
    scale,
    largest,
    total,
    max_weight,
    weighted,
    MASKED: tl.constexpr,
):
    """As `attend`, for keys and values in fp8, whose values q's dtype represents exactly.

    Scores are multiplied by the keys' scales, and softmax weights by the values'. The latter are
    relative to a line's `max_weight`, so that in fp16 they are at most 1, and only negligible ones
    underflow.
    """
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * k_scales[None, :]
    if MASKED:
        scores = tl.where(visible, scores, -float("inf"))
    raised = tl.maximum(largest, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - raised[:, None])
    shrink = tl.exp2(largest - raised)
    total = total * shrink + tl.sum(weights, axis=1)
    weights *= v_scales[None, :]
    kept = max_weight * shrink
    max_weight = tl.maximum(kept, tl.max(weights, axis=1))
    inverse = 1 / max_weight
    weighted *= (kept * inverse)[:, None]
    weights *= inverse[:, None]
    weighted = tl.dot(weights.to(q.dtype), v.to(q.dtype), weighted, input_precision="ieee")
    return raised, total, max_weight, weighted


@triton.jit
def paged_decode_attention(
    queries,  # (R, HEADS, HEAD_DIM)
    keys,  # (pages, HEADS, PAGE_SIZE, HEAD_DIM)
    values,
    key_scales,  # (pages, HEADS, PAGE_SIZE), fp32, or None
    value_scales,
    tables,  # (R, PAGES)
    positions,  # (R)
    groups,  # (R, 2): Inputs.groups_R2
    attn_mlp,  # (R, ROW), of which HEADS * HEAD_DIM columns are written
    sums,  # (R, HEADS, SPLITS + 1, HEAD_DIM), fp32
    scales,  # (R, HEADS, SPLITS + 1, 2), fp32: the largest score, and the exponentials' sum
    scale,  # of scores
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES: tl.constexpr,
    ROW: tl.constexpr,
    SPLITS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per token, head and split. Dao et al., "Flash-Decoding", 2023.

    The first of a group's tokens attends for all of them to the pages that they share, which are
    thus read once; the last split is each token's own part. Juravsky et al., "Hydragen", 2024.
    Tensor cores need LINES rows, of which a token without a group leaves all but one empty:
    decoding is bound by reading keys and values.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    tokens = tl.load(groups + row * 2) + 1
    shared = tl.load(groups + row * 2 + 1)
    context = tl.load(positions + row) + 1
    pages = (context + PAGE_SIZE - 1) // PAGE_SIZE
    if split == SPLITS:
        tokens = tl.where(shared > 0, 1, 0)
        first = shared
        last = pages
    else:
        pages = tl.where(shared > 0, shared, pages)
        run = (pages + SPLITS - 1) // SPLITS
        first = tl.minimum(split * run, pages)
        last = tl.minimum(first + run, pages)
    if tokens > 0:
        dims = tl.arange(0, BLOCK_DIM)
        inside = dims < HEAD_DIM
        lines = tl.arange(0, LINES)
        real = (lines < tokens)[:, None] & inside[None, :]
        query = queries + ((row + lines)[:, None] * HEADS + head) * HEAD_DIM + dims[None, :]
        q = tl.load(query, mask=real, other=0.0)
        largest = tl.full([LINES], -float("inf"), tl.float32)
        total = tl.zeros([LINES], tl.float32)
        weighted = tl.zeros([LINES, BLOCK_DIM], tl.float32)
        if key_scales is not None:
            max_weight = tl.zeros([LINES], tl.float32)
        end = tl.minimum(last * PAGE_SIZE, context)
        for start in tl.range(first * PAGE_SIZE, end, BLOCK_PLACES, num_stages=STAGES):
            places = start + tl.arange(0, BLOCK_PLACES)
            # Memory beyond the context may hold anything, even NaN.
            seen = places < end
            if key_scales is not None and BLOCK_PLACES == PAGE_SIZE:
                # Half the bytes leave half the time for instructions: addresses take few with one
                # page's number for all places.
                page = tl.load(tables + row * PAGES + start // PAGE_SIZE)
                slots = (page.to(tl.int64) * HEADS + head) * PAGE_SIZE + tl.arange(0, PAGE_SIZE)
            else:
                page = tl.load(tables + row * PAGES + places // PAGE_SIZE, mask=seen, other=0)
                slots = (page.to(tl.int64) * HEADS + head) * PAGE_SIZE + places % PAGE_SIZE
            block = slots[:, None] * HEAD_DIM + dims[None, :]
            loaded = seen[:, None] & inside[None, :]
            k = tl.load(keys + block, mask=loaded, other=0.0)
            v = tl.load(values + block, mask=loaded, other=0.0)
            visible = seen[None, :]
            if key_scales is None:
                largest, total, weighted = attend(
                    q, k, v, visible, scale, largest, total, weighted, True
                )
            else:
                k_scales = tl.load(key_scales + slots, mask=seen, other=0.0)
                v_scales = tl.load(value_scales + slots, mask=seen, other=0.0)
                largest, total, max_weight, weighted = attend_fp8(
                    q,
                    k,
                    v,
                    k_scales,
                    v_scales,
                    visible,
                    scale,
                    largest,
                    total,
                    max_weight,
                    weighted,
                    True,
                )
        if key_scales is not None:
            weighted *= max_weight[:, None]
        if (shared == 0) & (SPLITS == 1):
            target = attn_mlp + (row + lines)[:, None] * ROW + head * HEAD_DIM + dims[None, :]
            found = weighted / total[:, None]
            tl.store(target, found.to(attn_mlp.dtype.element_ty), mask=real)
        else:
            index = ((row + lines) * HEADS + head) * (SPLITS + 1) + split
            tl.store(sums + index[:, None] * HEAD_DIM + dims[None, :], weighted, mask=real)
            tl.store(scales + index * 2, largest, mask=lines < tokens)
            tl.store(scales + index * 2 + 1, total, mask=lines < tokens)


@triton.jit
def merge_splits(
    sums,  # (R, HEADS, SPLITS + 1, HEAD_DIM), fp32
    scales,  # (R, HEADS, SPLITS + 1, 2), fp32
    groups,  # (R, 2)
    attn_mlp,  # (R, ROW)
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROW: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One program per token and head: the weighted mean of its splits, if it has several."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    splits = SPLITS + tl.where(tl.load(groups + row * 2 + 1) > 0, 1, 0)
    if splits > 1:
        numbers = tl.arange(0, BLOCK_SPLITS)
        used = numbers < splits
        index = (row * HEADS + head) * (SPLITS + 1) + numbers
        dims = tl.arange(0, BLOCK_DIM)
        inside = dims < HEAD_DIM
        largest = tl.load(scales + index * 2, mask=used, other=-float("inf"))
        totals = tl.load(scales + index * 2 + 1, mask=used, other=0.0)
        weights = tl.exp2(largest - tl.max(largest, axis=0))  # 0 for a split without pages
        places = sums + index[:, None] * HEAD_DIM + dims[None, :]
        parts = tl.load(places, mask=used[:, None] & inside[None, :], other=0.0)
        found = tl.sum(parts * weights[:, None], axis=0) / tl.sum(totals * weights, axis=0)
        target = attn_mlp + row * ROW + head * HEAD_DIM + dims
        tl.store(target, found.to(attn_mlp.dtype.element_ty), mask=inside)


@triton.jit
def paged_prefill_attention(
    queries,  # (T, HEADS, HEAD_DIM)
    keys,  # (pages, HEADS, PAGE_SIZE, HEAD_DIM)
    values,
    key_scales,  # (pages, HEADS, PAGE_SIZE), fp32, or None
    value_scales,
    tables,  # (R, PAGES)
    tiles,  # (N, 4): row, first token, tokens, position of the first
    attn_mlp,  # (T, ROW)
    scale,  # of scores
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES: tl.constexpr,
    ROW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per head and tile. Dao et al., "FlashAttention", 2022."""
    head = tl.program_id(0)
    # The last tiles of a prompt see the most: they start first.
    tile = tiles + (tl.num_programs(1) - 1 - tl.program_id(1)) * 4
    row = tl.load(tile).to(tl.int64)
    start = tl.load(tile + 1).to(tl.int64)
    tokens = tl.load(tile + 2)
    position = tl.load(tile + 3)
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < HEAD_DIM
    lines = tl.arange(0, TILE)
    real = (lines < tokens)[:, None] & inside[None, :]
    query = queries + ((start + lines)[:, None] * HEADS + head) * HEAD_DIM + dims[None, :]
    q = tl.load(query, mask=real, other=0.0)
    largest = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    weighted = tl.zeros([TILE, BLOCK_DIM], tl.float32)
    if key_scales is not None:
        max_weight = tl.zeros([TILE], tl.float32)
    context = position + tokens
    # All lines see all places of the first blocks, which need no masks.
    border = position // BLOCK_PLACES * BLOCK_PLACES
    for first in tl.range(0, border, BLOCK_PLACES, num_stages=STAGES):
        places = first + tl.arange(0, BLOCK_PLACES)
        pages = tl.load(tables + row * PAGES + places // PAGE_SIZE)
        slots = (pages.to(tl.int64) * HEADS + head) * PAGE_SIZE + places % PAGE_SIZE
        block = slots[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(keys + block, mask=inside[None, :], other=0.0)
        v = tl.load(values + block, mask=inside[None, :], other=0.0)
        if key_scales is None:
            largest, total, weighted = attend(q, k, v, None, scale, largest, total, weighted, False)
        else:
            k_scales = tl.load(key_scales + slots)
            v_scales = tl.load(value_scales + slots)
            largest, total, max_weight, weighted = attend_fp8(
                q,
                k,
                v,
                k_scales,
                v_scales,
                None,
                scale,
                largest,
                total,
                max_weight,
                weighted,
                False,
            )
    for first in tl.range(border, context, BLOCK_PLACES, num_stages=STAGES):
        places = first + tl.arange(0, BLOCK_PLACES)
        seen = places < context
        pages = tl.load(tables + row * PAGES + places // PAGE_SIZE, mask=seen, other=0)
        slots = (pages.to(tl.int64) * HEADS + head) * PAGE_SIZE + places % PAGE_SIZE
        block = slots[:, None] * HEAD_DIM + dims[None, :]
        loaded = seen[:, None] & inside[None, :]
        k = tl.load(keys + block, mask=loaded, other=0.0)
        v = tl.load(values + block, mask=loaded, other=0.0)
        # Lines beyond the tile's tokens see what its last token sees, and are not stored.
        visible = (places[None, :] <= position + lines[:, None]) & seen[None, :]
        if key_scales is None:
            largest, total, weighted = attend(
                q, k, v, visible, scale, largest, total, weighted, True
            )
        else:
            k_scales = tl.load(key_scales + slots, mask=seen, other=0.0)
            v_scales = tl.load(value_scales + slots, mask=seen, other=0.0)
            largest, total, max_weight, weighted = attend_fp8(
                q,
                k,
                v,
                k_scales,
                v_scales,
                visible,
                scale,
                largest,
                total,
                max_weight,
                weighted,
                True,
            )
    if key_scales is not None:
        weighted *= max_weight[:, None]
    target = attn_mlp + (start + lines)[:, None] * ROW + head * HEAD_DIM + dims[None, :]
    found = (weighted / total[:, None]).to(attn_mlp.dtype.element_ty)
    tl.store(target, found, mask=real)


@triton.jit(do_not_specialize=["pages"])
def copy_pages(
    cache,  # (keys and values of the layers, pages, HEADS, PAGE_SIZE, HEAD_DIM)
    cache_scales,  # (keys and values of the layers, pages, HEADS, PAGE_SIZE), fp32, or None
    copies,  # (N, 3): from page, to page, filled places
    pages,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per copy, head, and keys or values of a layer."""
    copy = copies + tl.program_id(0).to(tl.int64) * 3
    part = tl.program_id(1).to(tl.int64) * pages
    head = tl.program_id(2)
    source = ((part + tl.load(copy)) * HEADS + head) * PAGE_SIZE
    target = ((part + tl.load(copy + 1)) * HEADS + head) * PAGE_SIZE
    count = tl.load(copy + 2)
    if cache_scales is not None:
        places = tl.arange(0, PAGE_SIZE)
        scales = tl.load(cache_scales + source + places, mask=places < count)
        tl.store(cache_scales + target + places, scales, mask=places < count)
    source *= HEAD_DIM
    target *= HEAD_DIM
    numbers = tl.arange(0, BLOCK)
    filled = numbers < count * HEAD_DIM
    tl.store(cache + target + numbers, tl.load(cache + source + numbers, mask=filled), mask=filled)


@triton.jit
def multiply_row(
    x,  # (INPUTS)
    weight,  # (columns, INPUTS)
    product,  # (columns)
    columns,
    INPUTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """GEMV, memory-bound, times FACTOR: one program per BLOCK_COLUMNS columns."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inputs = tl.arange(0, BLOCK_INPUTS)
    terms = tl.zeros([BLOCK_COLUMNS, BLOCK_INPUTS], tl.float32)
    for first in tl.range(0, INPUTS, BLOCK_INPUTS):
        place = first + inputs
        within = place < INPUTS
        loaded = (column < columns)[:, None] & within[None, :]
        values = tl.load(x + place, mask=within, other=0.0).to(tl.float32)
        weights = tl.load(
            weight + column[:, None] * INPUTS + place[None, :], mask=loaded, other=0.0
        )
        terms += weights.to(tl.float32) * values[None, :]
    found = tl.sum(terms, axis=1) * FACTOR
    tl.store(product + column, found.to(product.dtype.element_ty), mask=column < columns)


@triton.jit
def lora_shrink(
    x,  # (T, ROW)
    a,  # (slots, SLOT): each module's A (RANK, inputs), one after another
    adapters,  # (T): slots, or negative without an adapter
    ranks,  # (slots)
    small,  # (T, MODULES * RANK), fp32; not written beyond an adapter's rank
    ROW: tl.constexpr,
    SLOT: tl.constexpr,
    RANK: tl.constexpr,
    MODULES: tl.constexpr,
    FIRST: tl.constexpr,  # inputs of the first module
    SECOND: tl.constexpr,  # and of the others
    BESIDE: tl.constexpr,  # whether modules have inputs side by side, or the same
    BLOCK_RANK: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """A x, in fp32: one program per token and BLOCK_RANK rows of a module's A."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(adapters + token).to(tl.int64)
    module = part // (RANK // BLOCK_RANK)
    first = part % (RANK // BLOCK_RANK) * BLOCK_RANK
    if slot >= 0:
        if first < tl.load(ranks + slot):
            inputs = FIRST
            place = 0
            if BESIDE:
                inputs = tl.where(module == 0, FIRST, SECOND)
                place = module * FIRST
            rows = first + tl.arange(0, BLOCK_RANK)
            matrix = a + slot * SLOT + module * (RANK * FIRST) + rows * inputs
            source = x + token * ROW + place
            sums = tl.zeros([BLOCK_RANK], tl.float32)
            for start in range(0, inputs, BLOCK_INPUTS):
                columns = start + tl.arange(0, BLOCK_INPUTS)
                inside = columns < inputs
                values = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
                places = matrix[:, None] + columns[None, :]
                weights = tl.load(places, mask=inside[None, :], other=0.0).to(tl.float32)
                sums += tl.sum(weights * values[None, :], axis=1)
            tl.store(small + token * (MODULES * RANK) + module * RANK + rows, sums)


@triton.jit
def lora_expand(
    small,  # (T, MODULES * RANK), fp32
    b,  # (slots, COLUMNS, TERMS)
    adapters,  # (T)
    ranks,  # (slots)
    y,  # (T, COLUMNS), changed in place
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    TERMS: tl.constexpr,  # RANK, or MODULES * RANK where all modules have the same columns
    MODULES: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a module but the last, where they are side by side
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
):
    """Adds B (A x): one program per token and BLOCK_COLUMNS columns."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(adapters + token).to(tl.int64)
    if slot >= 0:
        rank = tl.load(ranks + slot)
        columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        inside = columns < COLUMNS
        modules = tl.minimum(columns // WIDTH, MODULES * RANK // TERMS - 1)
        target = y + token * COLUMNS + columns
        sums = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        for start in range(0, TERMS, BLOCK_TERMS):
            terms = start + tl.arange(0, BLOCK_TERMS)
            used = inside[:, None] & (terms % RANK < rank)[None, :]
            rows = b + (slot * COLUMNS + columns) * TERMS
            weights = tl.load(rows[:, None] + terms[None, :], mask=used, other=0.0).to(tl.float32)
            own = small + token * (MODULES * RANK) + modules * TERMS
            values = tl.load(own[:, None] + terms[None, :], mask=used, other=0.0)
            sums += tl.sum(weights * values, axis=1)
        tl.store(target, sums.to(y.dtype.element_ty), mask=inside)
