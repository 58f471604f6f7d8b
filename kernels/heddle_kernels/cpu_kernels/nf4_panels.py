"""An NF4 weight as the CPU's kernels read it: repacked once at load, the same bits and scales in another order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from heddle_kernels.cpu_kernels.bits import Floats, Stored
from heddle_kernels.cpu_kernels.vectors import PANEL
from heddle_kernels.nf4_weight import BLOCK_WEIGHTS, TWO_ZEROS, plain_rows

CODE_BYTES = PANEL * BLOCK_WEIGHTS // 2
BLOCK_BYTES = CODE_BYTES + PANEL * 4


@dataclass(frozen=True)
class Nf4Panels:
    """One linear layer. A panel is 16 output features, and its blocks of 64 input features follow one another.

    A block is 512 bytes of codes and the 16 float32 scales. Its codes are words of four weights: word
    [i, output, odd] holds inputs 8 i + odd, + 2, + 4 and + 6, from the lowest nibble up, so that 32 words shifted by
    4 n are, after one look-up, the 16 outputs' weights of two neighbouring inputs: what a bfloat16 product takes.
    """

    memory: Tensor  # [num_panels, num_blocks, BLOCK_BYTES] uint8; missing outputs have the scale 0
    in_features: int
    out_features: int

    @classmethod
    def from_bitsandbytes(cls, packed: Tensor, state: Any) -> Nf4Panels:
        """Raises UnsupportedWeight for what is not NF4 in whole blocks."""
        rows, absmax = plain_rows(packed, state, BLOCK_WEIGHTS)
        missing = -len(rows) % PANEL
        rows = pad(rows, (0, 0, 0, missing), value=TWO_ZEROS)
        absmax = pad(absmax, (0, 0, 0, missing))
        num_panels, num_blocks = len(rows) // PANEL, absmax.shape[1]
        # [panels, outputs, blocks, i, n, (even, odd) nibbles of a byte]
        bytes_of_words = rows.view(num_panels, PANEL, num_blocks, BLOCK_WEIGHTS // 8, 4)
        nibbles = torch.stack([bytes_of_words >> 4, bytes_of_words & 15], dim=-1).permute(0, 2, 3, 1, 5, 4)
        low, high = nibbles[..., 0::2], nibbles[..., 1::2]
        codes = (low | (high << 4)).reshape(num_panels, num_blocks, CODE_BYTES)
        scales = absmax.view(num_panels, PANEL, num_blocks).transpose(1, 2).contiguous().view(torch.uint8)
        return cls(torch.cat([codes, scales], dim=-1), rows.shape[1] * 2, state.shape[0])

    @classmethod
    def zeros(cls, in_features: int, out_features: int) -> Nf4Panels:
        num_panels, num_blocks = -(-out_features // PANEL), in_features // BLOCK_WEIGHTS
        return cls(torch.zeros(num_panels, num_blocks, BLOCK_BYTES, dtype=torch.uint8), in_features, out_features)

    @property
    def size_bytes(self) -> int:
        return self.memory.nbytes

    @property
    def words(self) -> Stored:
        """[num_panels, num_blocks, BLOCK_BYTES / 2] uint16, the same memory."""
        words: Stored = self.memory.numpy().view(np.uint16)
        return words

    @property
    def scales(self) -> Floats:
        """[num_panels, num_blocks, PANEL], the same memory."""
        return self.memory.numpy().view(np.float32)[..., CODE_BYTES // 4 :]
