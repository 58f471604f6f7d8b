"""Several linears that read the same input as one: their weights one below the other, their outputs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn


def join(linears: Sequence[Any]) -> nn.Module | None:
    """One linear that answers what `linears` answer, column by column; None where these cannot be joined.

    Every column is computed from the very same weights as before, in whatever order of sums the larger GEMM takes.
    """
    joined: nn.Module | None = None
    if all(type(linear) is nn.Linear for linear in linears):
        joined = _join_dense(linears)
    elif all(type(linear) is Linear4bit for linear in linears):
        joined = _join_4bit(linears)
    return None if joined is None else joined.eval()  # a training module would not take bitsandbytes' fused CPU path


def _join_dense(linears: Sequence[Any]) -> nn.Module | None:
    if len({(linear.weight.dtype, linear.weight.device) for linear in linears}) > 1:
        return None
    weight = torch.cat([linear.weight for linear in linears])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    joined.register_parameter("bias", _join_biases(linears))
    return joined


def _join_4bit(linears: Sequence[Any]) -> nn.Module | None:
    """bitsandbytes packs a weight row after row in blocks of 64 values: whole blocks can be put one after another."""
    states = [linear.weight.quant_state for linear in linears]
    first = states[0]
    if any(
        (state.quant_type, state.blocksize, state.dtype) != (first.quant_type, first.blocksize, first.dtype)
        or getattr(state, "packing_format_for_cpu", False)
        or linear.weight.dtype != torch.uint8
        or state.shape.numel() % state.blocksize
        for linear, state in zip(linears, states, strict=True)
    ):
        return None
    num_rows, in_features = sum(state.shape[0] for state in states), first.shape[1]
    state = unnested_state(first)
    state.absmax = torch.cat([block_scales(each) for each in states])
    state.shape = torch.Size((num_rows, in_features))
    joined: Any = Linear4bit(
        in_features,
        num_rows,
        bias=False,
        compute_dtype=linears[0].compute_dtype,
        quant_type=first.quant_type,
        device="meta",
    )
    joined.weight = Params4bit(
        torch.cat([linear.weight.data.view(-1, 1) for linear in linears]),
        quant_state=state,
        blocksize=first.blocksize,
        compress_statistics=False,
        quant_type=first.quant_type,
        bnb_quantized=True,
        module=joined,
    )
    joined.quant_state = state
    joined.register_parameter("bias", _join_biases(linears))
    joined.support_avx512bf16_for_cpu = all(linear.support_avx512bf16_for_cpu for linear in linears)
    as_module: nn.Module = joined
    return as_module


def unnested_state(state: Any) -> Any:
    """The same weight's description with plain scales, which costs less to read and more to keep."""
    return bnb.QuantState(
        absmax=block_scales(state),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )


def block_scales(state: Any) -> Tensor:
    """Each block's absmax as it was quantised: float32 [num_blocks]."""
    if not state.nested:
        plain: Tensor = state.absmax.float()
        return plain
    scales: Tensor = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float()


def _join_biases(linears: Sequence[Any]) -> nn.Parameter | None:
    """[sum of out_features]; zeros where a linear has none."""
    biases = [linear.bias for linear in linears]
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    parts = [
        like.new_zeros(linear.out_features) if bias is None else bias
        for linear, bias in zip(linears, biases, strict=True)
    ]
    return nn.Parameter(torch.cat(parts), requires_grad=False)
