"""How the base's 4-bit linears are computed: by bitsandbytes, by our kernels, or written out for large batches.

4-bit weights are fewer bytes, which decides for few tokens. For many arithmetic decides, and there a dense product
wins, even if the weights must be written out first.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn import functional

from heddle_kernels.nf4_weight import UnsupportedWeight
from heddle_kernels.ops import Ops
from heddle_server.engine.joined_linear import unnested_state

logger = logging.getLogger(__name__)

DENSE_FROM_TOKENS = 64  # for our GPU kernels, by the roofline of a H200, where the arithmetic of 4-bit weights begins
TRIED_TOKENS = (8, 16, 32, 64, 128, 256, 512)  # on a CPU the machine is asked
NEVER = sys.maxsize
NUM_TRIALS = 3
REPACKED_ROWS = 32  # of a weight, that bitsandbytes interleaves on a CPU (its _convert_weight_packed_for_cpu, 0.50)


class Crossover:
    """The number of tokens from which dense weights are faster: one for all linears."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens


class BaseLinears:
    """Makes, for each linear or joined linears of the base, the module that computes it."""

    def __init__(self, ops: Ops, dtype: torch.dtype, keep_dense: bool) -> None:
        """`dtype` that the base computes in; `keep_dense`: 4-bit weights are also kept written out in it."""
        self._dtype = dtype
        self._make_nf4 = getattr(ops, "nf4_linear", None)
        self._keep_dense = keep_dense
        self._crossover = Crossover(DENSE_FROM_TOKENS)
        self._on_cpu = list[DenseForMany]()
        self._num_fused = 0
        self._left = Counter[str]()  # 4-bit linears that our kernels do not take, by the reason

    def make(self, linear: nn.Module) -> nn.Module:
        """To be asked before `linear` has computed anything: bitsandbytes repacks weights at a first CPU forward."""
        if not isinstance(linear, Linear4bit):
            return linear
        if linear.bias is not None:
            linear.bias.data = linear.bias.data.to(self._dtype)  # as bitsandbytes does when it first computes
        computed = self._fused(linear)
        if not _can_be_repacked(linear):
            linear.support_avx512bf16_for_cpu = False  # bitsandbytes asks for the processor alone, and then fails
        on_cpu = linear.weight.device.type == "cpu"
        # The others write weights out by themselves where that is faster.
        is_for_few = hasattr(computed, "write_out") or (computed is linear and linear.support_avx512bf16_for_cpu)
        if not (self._keep_dense or (on_cpu and is_for_few)):
            return computed
        made = DenseForMany(computed, self._dense(linear, computed), self._crossover)
        if on_cpu and is_for_few:
            self._on_cpu.append(made)
        return made

    def finish(self) -> None:
        """When all are made: find out what this machine is good at, and say what falls back and why."""
        if self._on_cpu:
            largest = max(self._on_cpu, key=lambda made: made.out_features * made.in_features)
            self._crossover.num_tokens = measured_crossover(largest)
            few, action = self._crossover.num_tokens, "used" if self._keep_dense else "written out"
            when = "in no step" if few == NEVER else f"from {few} tokens on"
            logger.info("4-bit weights: dense ones are %s %s", action, when)
        if self._num_fused:
            logger.info("4-bit weights: our product computes %d linears, joined ones counted once", self._num_fused)
        for reason, count in self._left.items():
            logger.info("bitsandbytes computes %d linears, joined ones counted once: %s", count, reason)

    def _dense(self, linear: Any, computed: Any) -> Dense:
        weight, state = linear.weight.data, linear.weight.quant_state
        if self._keep_dense:
            return Kept(WriteOut(weight, state, self._dtype)())
        if computed is linear:
            return WriteOut(weight.clone(), state, self._dtype)  # of its own: the first forward reorders the linear's
        write_out: Dense = computed.write_out
        return write_out

    def _fused(self, linear: Any) -> nn.Module:
        if self._make_nf4 is None:
            return linear  # type: ignore[no-any-return]
        try:
            fused: nn.Module = self._make_nf4(linear.weight.data, linear.weight.quant_state, linear.bias, self._dtype)
        except UnsupportedWeight as error:
            self._left[str(error)] += 1
            return linear  # type: ignore[no-any-return]
        self._num_fused += 1
        return fused


def _can_be_repacked(linear: Any) -> bool:
    """Whether bitsandbytes' own fused product on a CPU takes a weight of this shape."""
    out_features, in_features = linear.weight.quant_state.shape
    return bool(out_features % REPACKED_ROWS == 0 and in_features % linear.weight.quant_state.blocksize == 0)


class WriteOut:
    """Writes a 4-bit linear's weight [out_features, in_features] out, whenever it is called."""

    def __init__(self, packed: Tensor, state: Any, dtype: torch.dtype) -> None:
        """packed, state: as bitsandbytes quantised the weight."""
        self._packed = packed
        self._state = unnested_state(state)
        self._dtype = dtype

    def __call__(self) -> Tensor:
        weight: Tensor = bnb.dequantize_4bit(self._packed, self._state)
        return weight.to(self._dtype)

    @property
    def size_bytes(self) -> int:
        return int(self._packed.nbytes + self._state.absmax.nbytes)


class Kept:
    """Has written it out once."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.size_bytes = weight.nbytes

    def __call__(self) -> Tensor:
        return self._weight


Dense = Callable[[], Tensor]  # a weight [out_features, in_features], perhaps in memory that the next call takes


class DenseForMany(nn.Module):
    """A 4-bit linear for few tokens, its weights written out for many."""

    bias: Tensor | None

    def __init__(self, quantised: Any, dense: Dense, crossover: Crossover) -> None:
        super().__init__()
        self.quantised = quantised
        self.dense = dense
        self.crossover = crossover
        self.in_features: int = quantised.in_features
        self.out_features: int = quantised.out_features
        self.bias = quantised.bias
        # Beside those of `quantised`.
        self.quantized_bytes = dense.size_bytes if isinstance(dense, WriteOut) else 0
        self.dense_bytes = dense.size_bytes if isinstance(dense, Kept) else 0
        if hasattr(quantised, "partial_sums"):
            self.partial_sums = self._partial_sums

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.quantised.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]"""
        if x.numel() // self.in_features >= self.crossover.num_tokens:
            return functional.linear(x, self.dense(), self.bias)
        y: Tensor = self.quantised(x)
        return y

    def _partial_sums(self, x: Tensor) -> Tensor | None:
        sums: Tensor | None = None if len(x) >= self.crossover.num_tokens else self.quantised.partial_sums(x)
        return sums


@torch.inference_mode()
def measured_crossover(linear: DenseForMany) -> int:
    """The least of TRIED_TOKENS from which on writing out and multiplying is faster here, or NEVER.

    From the largest down, so that one disturbed trial of few tokens does not decide for all that come later.
    """
    crossover = NEVER
    for num_tokens in reversed(TRIED_TOKENS):
        x = torch.ones(num_tokens, linear.in_features, dtype=linear.dense().dtype)
        if _seconds(lambda given: functional.linear(given, linear.dense()), x) >= _seconds(linear.quantised, x):
            break
        crossover = num_tokens
    return crossover


def _seconds(compute: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The best of a few runs; the first of them also pays for what is done once."""

    def run() -> float:
        started = time.perf_counter()
        compute(x)
        return time.perf_counter() - started

    return min(run() for _ in range(NUM_TRIALS))
