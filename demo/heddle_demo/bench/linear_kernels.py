"""Times a layer's linears: dense, by bitsandbytes on its several ways, and as heddle's engine computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor
from torch.nn import functional

from heddle_demo.bench.kernel_plan import KernelPlan
from heddle_demo.bench.kernel_results import Timing
from heddle_demo.bench.rotation import num_copies, seconds_per_call
from heddle_kernels.ops import Ops
from heddle_server.engine.base_linear import BaseLinears

DTYPE = torch.bfloat16
# What must move of a 4-bit weight: half a byte, and a scale of 16 bits for 64 weights.
FLOOR_BYTES_PER_WEIGHT = 1 / 2 + 2 / 64
BITSANDBYTES_BYTES_PER_WEIGHT = 1 / 2 + 4 / 64
# Written out in 16 bits for a matmul to read them again.
WRITTEN_OUT_BYTES_PER_WEIGHT = BITSANDBYTES_BYTES_PER_WEIGHT + 2 * DTYPE.itemsize

Multiply = Callable[[Tensor], Tensor]  # x [num_tokens, in_features] -> [num_tokens, out_features]


@dataclass(frozen=True)
class LinearArm:
    """One way to multiply by a layer's weights."""

    name: str
    bytes_per_weight: float
    make: Callable[[Sequence[Linear4bit]], Sequence[Multiply]]  # over the weights of these, which it may repack


def linear_arms(device: torch.device, ops: Ops) -> list[LinearArm]:
    """Those that there are on this device; heddle's own last."""
    ours = FLOOR_BYTES_PER_WEIGHT if ops.name == "triton" else BITSANDBYTES_BYTES_PER_WEIGHT
    return [
        LinearArm("dense", DTYPE.itemsize, _each(_dense)),
        *(_on_cuda() if device.type == "cuda" else _on_cpu()),
        LinearArm("heddle", ours, lambda linears: _ours(ops, linears)),
    ]


def _on_cuda() -> list[LinearArm]:
    return [
        LinearArm("bnb auto", BITSANDBYTES_BYTES_PER_WEIGHT, _each(_as_it_is)),
        LinearArm("bnb fused", BITSANDBYTES_BYTES_PER_WEIGHT, _each(partial(_cuda_way, "_gemm_4bit_kernel_impl"))),
        LinearArm("bnb dequant", WRITTEN_OUT_BYTES_PER_WEIGHT, _each(partial(_cuda_way, "_dequant_linear_fallback"))),
    ]


def _on_cpu() -> list[LinearArm]:
    return [
        LinearArm("bnb fused", BITSANDBYTES_BYTES_PER_WEIGHT, _each(_as_it_is)),
        LinearArm("bnb dequant", WRITTEN_OUT_BYTES_PER_WEIGHT, _each(_not_repacking)),
    ]


def _each(make: Callable[[Linear4bit], Multiply]) -> Callable[[Sequence[Linear4bit]], Sequence[Multiply]]:
    return lambda linears: [make(linear) for linear in linears]


def time_linears(
    layer: str,
    in_features: int,
    out_features: int,
    plan: KernelPlan,
    num_layers: int,
    arms: list[LinearArm],
    device: torch.device,
) -> Iterator[Timing]:
    """One layer by all arms, for every number of tokens of the plan."""
    num_weights = in_features * out_features
    values = torch.randn(out_features, in_features, device=device, dtype=DTYPE) * in_features**-0.5
    quantized = quantize_4bit(values, blocksize=64, quant_type="nf4")
    exact = dequantize_4bit(*quantized).float()  # [out_features, in_features]
    for arm in arms:
        copies = num_copies(int(num_weights * arm.bytes_per_weight), num_layers, device)
        multiplies = arm.make([_linear(*quantized) for _ in range(copies)])
        for num_tokens in plan.tokens:
            x = torch.randn(num_tokens, in_features, device=device).to(DTYPE)
            calls = [lambda multiply=multiply, x=x: multiply(x) for multiply in multiplies]
            seconds = seconds_per_call(calls, device, plan.cpu_seconds)
            activation_bytes = num_tokens * (in_features + out_features) * DTYPE.itemsize
            yield Timing(
                part="linears",
                layer=layer,
                size={"in": in_features, "out": out_features, "tokens": num_tokens},
                arm=arm.name,
                seconds=seconds,
                num_bytes=int(num_weights * arm.bytes_per_weight) + activation_bytes,
                floor_bytes=int(num_weights * FLOOR_BYTES_PER_WEIGHT) + activation_bytes,
                relative_error=_error(calls[0](), x.float() @ exact.T),
            )


def _linear(packed: Tensor, state: QuantState) -> Linear4bit:
    """bitsandbytes' own, over a copy of these weights: it may repack them in place."""
    out_features, in_features = state.shape
    linear = Linear4bit(in_features, out_features, bias=False, compute_dtype=DTYPE, quant_type="nf4", device="meta")
    state = deepcopy(state)
    linear.weight = Params4bit(
        packed.clone(),
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=False,  # transformers' default, and the faster
        quant_type="nf4",
        bnb_quantized=True,
        module=linear,
    )
    linear.quant_state = state
    return linear.eval()


def _dense(linear: Linear4bit) -> Multiply:
    weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state)  # in the dtype of what was quantised
    return lambda x: functional.linear(x, weight)


def _as_it_is(linear: Linear4bit) -> Multiply:
    """On a CPU that can it repacks its weights in the first call."""
    multiply: Multiply = linear
    return multiply


def _not_repacking(linear: Linear4bit) -> Multiply:
    linear.support_avx512bf16_for_cpu = False
    return _as_it_is(linear)


def _cuda_way(name: str, linear: Linear4bit) -> Multiply:
    """One of bitsandbytes' two ways, whichever it would have chosen."""
    from bitsandbytes.backends.cuda import ops as cuda_ops

    way, packed, state = getattr(cuda_ops, name), linear.weight.data, linear.weight.quant_state
    arguments = packed, state.shape, state.absmax, state.blocksize, state.quant_type
    return lambda x: way(x, *arguments)


def _ours(ops: Ops, linears: Sequence[Linear4bit]) -> Sequence[Multiply]:
    """As the engine has its base computed, written out from where that is faster."""
    base = BaseLinears(ops, DTYPE, keep_dense=False)
    made: list[Multiply] = [base.make(linear) for linear in linears]
    base.finish()
    return made


def _error(actual: object, exact: Tensor) -> float:
    assert isinstance(actual, Tensor)
    return float(torch.linalg.vector_norm(actual.float() - exact) / torch.linalg.vector_norm(exact))
