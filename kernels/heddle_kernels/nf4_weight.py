"""An NF4 weight as our kernels read it: repacked once at load, the same bits in another order.

Layout: 128 output features by 128 input features are one *cell*, 8,192 bytes that lie together, and the cells along a
row of the matrix follow one another, so a program streams one run of memory. A byte's high nibble is the weight of
input j and its low nibble that of input 64 + j of the cell, so each half has one absmax. Within a cell the bytes lie
in the order in which the tensor cores want the weights in registers (NVIDIA's m64k16 fragment of a first operand):
every thread reads 16 neighbouring bytes and, decoded, has its operand in place, without going through shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

CELL = 128  # features of a cell, both ways
CELL_BYTES = CELL * CELL // 2
CELL_SCALES = CELL * 2  # absmax values of a cell: two blocks in each of its rows
BLOCK_WEIGHTS = 64  # weights that share an absmax
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)  # Dettmers et al., QLoRA (2023), appendix E
TWO_ZEROS = 0x77  # a byte whose nibbles both decode to 0

# The bits of a row number (7, from the highest) and of a byte number within it (6), as axes of their own:
#   rows: [2 halves, 4 warps, 2 registers, 8 lanes / 4]; bytes: [2, 2, 2 registers, 4 lanes % 4, 2 in a register]
_ROW_AXES = (2, 4, 2, 8)
_BYTE_AXES = (2, 2, 2, 4, 2)
_STORED_AXES = (2, 2, 4, 8, 4, 2, 2, 2, 2)  # the same axes in the order in which a cell stores them
_TO_STORED = (4, 0, 1, 3, 7, 5, 6, 2, 8)  # stored axis i is axis _TO_STORED[i] of [*_ROW_AXES, *_BYTE_AXES]
_FROM_STORED = (1, 2, 7, 3, 0, 5, 6, 4, 8)


class UnsupportedWeight(ValueError):
    """A 4-bit weight that this container does not take; the text says why."""


@dataclass(frozen=True)
class Nf4Weight:
    """One linear layer, or several that read the same input, their rows one after another."""

    packed: Tensor  # [num_row_cells, num_column_cells, CELL_BYTES] uint8; missing rows decode to zeros
    absmax: Tensor  # [num_row_cells, num_column_cells, CELL_SCALES] float16 or float32
    in_features: int
    out_features: tuple[int, ...]  # of each layer
    dtype: torch.dtype  # of the weight before it was quantised

    @classmethod
    def from_bitsandbytes(
        cls, weights: Sequence[tuple[Tensor, Any]], absmax_dtype: torch.dtype = torch.float16
    ) -> Nf4Weight:
        """Take over (packed bytes, quant_state) of layers that read the same input; doubly quantised ones too.

        Weights are kept bit for bit. absmax_dtype float32 keeps their scales as well; float16 rounds them by up to
        1 in 2,048 and saves 5.6 % of all bytes. The output's error, beside that of a weight rounded to bfloat16, does
        not change with it: 1.37e-3 either way on a 2048 x 4096 layer.

        The bytes must be as bitsandbytes quantised them: it reorders them at the first forward on some CPUs.
        Raises UnsupportedWeight.
        """
        rows, scales = list[Tensor](), list[Tensor]()
        for packed, state in weights:
            bytes_of_rows, absmax_of_rows = plain_rows(packed, state, CELL)
            rows.append(bytes_of_rows)
            scales.append(absmax_of_rows)
        if len({tuple(state.shape)[1] for _, state in weights}) != 1:
            raise UnsupportedWeight("layers that are computed together must read the same input")
        absmax = torch.cat(scales).to(absmax_dtype)
        if not absmax.isfinite().all():
            raise UnsupportedWeight(f"an absmax is not a finite number in {absmax_dtype}")
        return cls(
            packed=_to_cells(torch.cat(rows)),
            absmax=_to_cell_scales(absmax),
            in_features=rows[0].shape[1] * 2,
            out_features=tuple(len(of_layer) for of_layer in rows),
            dtype=weights[0][1].dtype,
        )

    @property
    def num_rows(self) -> int:
        """Output features of all layers together."""
        return sum(self.out_features)

    @property
    def num_padded_rows(self) -> int:
        return self.packed.shape[0] * CELL

    @property
    def size_bytes(self) -> int:
        return self.packed.nbytes + self.absmax.nbytes

    def to(self, device: torch.device | str) -> Nf4Weight:
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device))

    def site(self, number: int) -> Nf4Weight:
        """One of the layers alone. Shares memory with the whole if it begins on a cell, as in most models."""
        begin = [0, *accumulate(self.out_features)][number]
        end = begin + self.out_features[number]
        if begin % CELL == 0 and (end % CELL == 0 or end == self.num_rows):
            cells = slice(begin // CELL, -(-end // CELL))
            packed, absmax = self.packed[cells], self.absmax[cells]
        else:
            packed = _to_cells(_from_cells(self.packed)[begin:end])
            absmax = _to_cell_scales(_from_cell_scales(self.absmax)[begin:end])
        return replace(self, packed=packed, absmax=absmax, out_features=(end - begin,))

    def to_bitsandbytes(self) -> list[tuple[Tensor, Tensor]]:
        """The inverse of `from_bitsandbytes`, of each layer: packed bytes [weights / 2, 1], absmax [blocks] float32."""
        rows = _from_cells(self.packed)[: self.num_rows].split_with_sizes(self.out_features)
        scales = _from_cell_scales(self.absmax)[: self.num_rows].split_with_sizes(self.out_features)
        return [
            (of_layer.reshape(-1, 1), absmax.float().flatten()) for of_layer, absmax in zip(rows, scales, strict=True)
        ]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [num_rows, in_features]: code times absmax in float32, rounded once."""
        packed = _from_cells(self.packed)[: self.num_rows]
        nibbles = torch.stack([packed >> 4, packed & 15], dim=-1)  # [num_rows, in_features / 2, 2]
        code = torch.tensor(NF4_CODE, device=packed.device)
        blocks = code[nibbles.int()].view(self.num_rows, -1, BLOCK_WEIGHTS)
        scaled = blocks * _from_cell_scales(self.absmax)[: self.num_rows, :, None].float()
        return scaled.view(self.num_rows, self.in_features).to(dtype)


def plain_rows(packed: Tensor, state: Any, multiple: int) -> tuple[Tensor, Tensor]:
    """A weight as bitsandbytes quantised it, doubly or not -> its rows' bytes uint8 [out_features, in_features / 2],
    high nibble first, and absmax float32 [out_features, in_features / 64].

    Raises UnsupportedWeight, also where in_features is not a multiple of `multiple`.
    """
    _check(packed, state, multiple)
    num_rows, in_features = state.shape
    rows = packed.contiguous().view(torch.uint8).view(num_rows, in_features // 2)
    return rows, _plain_absmax(state).view(num_rows, in_features // BLOCK_WEIGHTS)


def _check(packed: Tensor, state: Any, multiple: int) -> None:
    if state.quant_type != "nf4":
        raise UnsupportedWeight(f"quantised as {state.quant_type}, not nf4")
    if state.blocksize != BLOCK_WEIGHTS:
        raise UnsupportedWeight(f"{state.blocksize} weights share an absmax, not {BLOCK_WEIGHTS}")
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedWeight("its bytes were reordered for a CPU by a forward pass; take them before the first one")
    if len(state.shape) != 2:
        raise UnsupportedWeight(f"a weight has 2 dimensions, not the {len(state.shape)} of {tuple(state.shape)}")
    num_rows, in_features = state.shape
    if in_features % multiple != 0:
        raise UnsupportedWeight(f"{in_features} input features are not a multiple of {multiple}")
    if packed.nbytes * 2 != num_rows * in_features:
        raise UnsupportedWeight(f"{packed.nbytes} bytes are not {num_rows} x {in_features} weights")
    if state.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise UnsupportedWeight(f"it was quantised from {state.dtype}")
    if not torch.equal(state.code.float().cpu(), torch.tensor(NF4_CODE)):
        raise UnsupportedWeight("its 16 code values are not those of nf4")


def _plain_absmax(state: Any) -> Tensor:
    """The absmax of every block, float32 [blocks]; exactly what bitsandbytes computes if it is quantised itself."""
    if not state.nested:
        return torch.as_tensor(state.absmax).float()
    outer = state.state2
    scale = outer.absmax.float().repeat_interleave(outer.blocksize)[: state.absmax.numel()]
    return torch.as_tensor(outer.code.float()[state.absmax.flatten().int()] * scale + state.offset.float())


def _to_cells(rows: Tensor) -> Tensor:
    """bitsandbytes' bytes [num_rows, in_features / 2] (high nibble first) -> [row cells, column cells, CELL_BYTES]."""
    rows = pad(rows, (0, 0, 0, -len(rows) % CELL), value=TWO_ZEROS)
    num_column_cells = rows.shape[1] * 2 // CELL
    halves = torch.stack([rows >> 4, rows & 15], dim=-1).view(len(rows), num_column_cells, 2, CELL // 2)
    joined = (halves[:, :, 0] << 4) | halves[:, :, 1]  # [num_rows, num_column_cells, 64]
    axes = joined.view(-1, CELL, num_column_cells, CELL // 2).transpose(1, 2)
    axes = axes.reshape(-1, num_column_cells, *_ROW_AXES, *_BYTE_AXES)
    return axes.permute(0, 1, *(2 + axis for axis in _TO_STORED)).reshape(-1, num_column_cells, CELL_BYTES)


def _from_cells(cells: Tensor) -> Tensor:
    """The inverse of `_to_cells`, with the rows that it added."""
    num_column_cells = cells.shape[1]
    axes = cells.view(-1, num_column_cells, *_STORED_AXES).permute(0, 1, *(2 + axis for axis in _FROM_STORED))
    joined = axes.reshape(-1, num_column_cells, CELL, CELL // 2).transpose(1, 2)
    halves = torch.stack([joined >> 4, joined & 15], dim=-2).reshape(-1, num_column_cells * CELL // 2, 2)
    return (halves[..., 0] << 4) | halves[..., 1]


def _to_cell_scales(absmax: Tensor) -> Tensor:
    """absmax [num_rows, in_features / 64] -> [row cells, column cells, CELL_SCALES], in the order of the rows."""
    absmax = pad(absmax, (0, 0, 0, -len(absmax) % CELL))
    axes = absmax.view(-1, *_ROW_AXES, absmax.shape[1] // 2, 2)
    return axes.permute(0, 5, 1, 2, 4, 3, 6).reshape(-1, absmax.shape[1] // 2, CELL_SCALES)


def _from_cell_scales(scales: Tensor) -> Tensor:
    """The inverse of `_to_cell_scales`, with the rows that it added."""
    axes = scales.view(*scales.shape[:2], 2, 4, 8, 2, 2).permute(0, 2, 3, 5, 4, 1, 6)
    return axes.reshape(-1, scales.shape[1] * 2)
