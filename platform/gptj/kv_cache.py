"""A KV cache that grows in place: keys and values (B, H, L, K) of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class KVCache:
    """A batch's past: one (keys, values) pair per layer, both (B, H, length, K).

    Capacity doubles as needed, so a token costs one write rather than a copy of the past. While
    autograd records, pairs are concatenated instead: in-place writes would modify tensors that the
    backward pass needs.

    Indexing and iteration give the pairs, as with Hugging Face's `past_key_values`.
    """

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self._layers = [_Layer(keys, values) for keys, values in past]

    @classmethod
    def of(cls, past: KVCache | Sequence[tuple[Tensor, Tensor]] | None) -> KVCache:
        """The cache itself, or a new one with the given pairs (None: empty)."""
        if isinstance(past, KVCache):
            return past
        return cls() if past is None else cls(past)

    @property
    def length(self) -> int:
        """Number of cached positions."""
        return self._layers[-1].length if self._layers else 0

    def get_seq_length(self) -> int:
        """Hugging Face's name for `length`."""
        return self.length

    def update(self, layer: int, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Append L positions to a layer; returns all of its keys and values, (B, H, S, K)."""
        if layer == len(self._layers):
            self._layers.append(_Layer(k_BHLK, v_BHLK))
        else:
            self._layers[layer].append(k_BHLK, v_BHLK)
        return self[layer]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order: for beams and finished rows.

        Args:
            rows: (B') int64; rows may repeat.
        """
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def crop(self, length: int) -> None:
        """Drop all positions from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} positions to {length}")
        for layer in self._layers:
            layer.length = length

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._layers[layer].pair()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (layer.pair() for layer in self._layers)


class _Layer:
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys  # (B, H, capacity, K)
        self.values = values
        self.length = keys.shape[2]

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        end = self.length + keys.shape[2]
        if torch.is_grad_enabled() and (keys.requires_grad or self.keys.requires_grad):
            old_keys, old_values = self.pair()
            self.keys = torch.cat((old_keys, keys), dim=2)
            self.values = torch.cat((old_values, values), dim=2)
        else:
            if end > self.keys.shape[2]:
                self.keys = self._with_room(self.keys, end)
                self.values = self._with_room(self.values, end)
            self.keys[:, :, self.length : end] = keys
            self.values[:, :, self.length : end] = values
        self.length = end

    def _with_room(self, old: Tensor, needed: int) -> Tensor:
        batch, heads, capacity, width = old.shape
        new = old.new_empty(batch, heads, max(needed, 2 * capacity), width)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new
