"""A linear layer over 4-bit weights: few tokens through the fused kernel, many through weights that are written out."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from heddle_kernels.dense_buffer import DenseBuffer
from heddle_kernels.nf4_weight import Nf4Weight
from heddle_kernels.triton_kernels.nf4 import MAX_TOKENS, dequantize, nf4_gemm, reduce


class Nf4Linear(nn.Module):
    """Takes the place of a base's linear; sites that read the same input are one layer."""

    weight: Tensor  # where modelling code looks for a device
    bias: Tensor | None

    def __init__(self, weight: Nf4Weight, bias: Tensor | None, dense: DenseBuffer) -> None:
        super().__init__()
        self._weight = weight
        self._dense = dense
        self.register_buffer("weight", weight.packed, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.in_features = weight.in_features
        self.out_features = weight.num_rows
        self.quantized_bytes = weight.size_bytes

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]"""
        flat = x.reshape(-1, self.in_features)
        sums = self.partial_sums(flat)
        if sums is None:
            dense = dequantize(self._weight, self._dense.of(self._weight.num_rows * self.in_features, flat))
            y = functional.linear(flat, dense, self.bias)
        else:
            y = reduce(sums, self.bias, flat.new_empty(flat.shape[0], self.out_features))
        return y.view(*x.shape[:-1], self.out_features)

    def partial_sums(self, x: Tensor) -> Tensor | None:
        """x [num_tokens, in_features] -> float32 [splits, num_tokens, padded out_features], to be added up by whoever
        adds the adapters; the bias is not in it. None for more tokens than the fused kernel is good for."""
        return nf4_gemm(x, self._weight) if 1 <= len(x) <= MAX_TOKENS else None
