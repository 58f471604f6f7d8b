"""A linear layer over 4-bit weights on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heddle_kernels.cpu_kernels.bits import as_stored
from heddle_kernels.cpu_kernels.nf4_panels import Nf4Panels
from heddle_kernels.cpu_kernels.nf4_product import (
    MOST_ROWS,
    multiply_by_tiles,
    multiply_by_vectors,
    write_out,
)
from heddle_kernels.cpu_kernels.team import new_tasks, team_size
from heddle_kernels.cpu_kernels.tiles import has_tiles
from heddle_kernels.cpu_kernels.vectors import BLOCK_PAIRS, PANEL
from heddle_kernels.dense_buffer import DenseBuffer

# On tiles a token costs next to nothing beside decoding; one or two are faster without.
TILES_FROM_TOKENS = 3


class CpuNf4Linear(nn.Module):
    """Takes the place of a base's linear; computes in bfloat16."""

    weight: Tensor  # where modelling code looks for a device
    bias: Tensor | None

    def __init__(self, panels: Nf4Panels, bias: Tensor | None, dense: DenseBuffer) -> None:
        super().__init__()
        self._dense = dense
        self._words, self._scales = panels.words, panels.scales
        self.register_buffer("weight", panels.memory, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.in_features = panels.in_features
        self.out_features = panels.out_features
        self.quantized_bytes = panels.size_bytes

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] of x's dtype; computed in bfloat16, as the layer that it replaces
        would."""
        flat = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        y = flat.new_empty(len(flat), self.out_features)
        num_threads = team_size()
        bias = _NO_BIAS if self.bias is None else as_stored(self.bias)
        given = (num_threads, new_tasks(), as_stored(flat), self._words, self._scales, bias)
        # torch begins memory on a cache line, as numpy does not, and a vector that lies in two lines costs twice.
        sums = torch.empty(num_threads, 2, MOST_ROWS, PANEL).numpy()
        if has_tiles() and len(flat) >= max(TILES_FROM_TOKENS, 1):
            pairs = as_stored(flat.new_empty(num_threads, 2, BLOCK_PAIRS, PANEL, 2))
            multiply_by_tiles(*given, pairs, sums, as_stored(y))
        else:
            multiply_by_vectors(*given, sums, as_stored(y))
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def write_out(self) -> Tensor:
        """The weight [out_features, in_features] bfloat16: rounded once, as bitsandbytes writes it out. In memory that
        the next call over the same buffer takes."""
        num_values = self.out_features * self.in_features
        weight = self._dense.of(num_values, _NO_VALUES)[:num_values].view(self.out_features, self.in_features)
        write_out(team_size(), new_tasks(), self._words, self._scales, as_stored(weight))
        return weight


_NO_VALUES = torch.empty(0, dtype=torch.bfloat16)
_NO_BIAS = as_stored(_NO_VALUES)
