"""How many bytes quantised linears take in the form in which they are computed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from bitsandbytes.nn.modules import has_avx512bf16

from heddle_kernels.dispatch import BackendUnavailable, select_kernels
from heddle_kernels.nf4_weight import BLOCK_WEIGHTS, CELL, CELL_BYTES, CELL_SCALES
from heddle_server.config import ConfigError, EngineConfig

NESTED_BLOCK = 256  # scales of a doubly quantised weight that share a scale of their own
CELL_SCALE_BYTES = 2  # float16

# Who computes them: heddle's product on the CPU or on a GPU, or bitsandbytes; on some CPUs it reorders a weight, and
# heddle keeps another copy to write out for many tokens.
Product = Literal["cpu", "gpu", "bitsandbytes", "bitsandbytes reordered"]


@dataclass(frozen=True)
class QuantizedForm:
    """Of 4-bit linears."""

    product: Product
    dense_element_bytes: int  # of the weights that --base-cache keeps written out; 0 for none

    @classmethod
    def of(cls, config: EngineConfig, quantization: str, dtype: torch.dtype, device_type: str) -> QuantizedForm:
        """Raises ConfigError where kernels are asked for that cannot run here."""
        return cls(
            product=_product(config, quantization, dtype, device_type),
            dense_element_bytes=dtype.itemsize if config.base_cache == "bf16" else 0,
        )

    def takes_bias(self, in_features: int, out_features: tuple[int, ...]) -> bool:
        """Whether the product holds the bias as its own, so that the server does not count it as a weight."""
        return self._product_of(in_features, out_features) == "gpu" and not self.dense_element_bytes

    def size_bytes(self, in_features: int, out_features: tuple[int, ...], *, is_nested: bool) -> int:
        """Of one linear, or of several that are joined to one: weights, scales, and a copy to write out.

        `is_nested`: the scales are quantised too, which ends where linears are joined or repacked.
        """
        if len(out_features) > 1 and any(out * in_features % BLOCK_WEIGHTS for out in out_features):
            alone = ((out,) for out in out_features)  # bitsandbytes' blocks go over the ends of these
            return sum(self.size_bytes(in_features, each, is_nested=is_nested) for each in alone)
        shape = (sum(out_features), in_features)
        num_blocks = -(-prod(shape) // BLOCK_WEIGHTS)
        packed = -(-prod(shape) // 2)
        match self._product_of(in_features, out_features):
            case "cpu":
                return _panel_bytes(*shape)
            case "gpu":
                return -(-shape[0] // CELL) * (shape[1] // CELL) * (CELL_BYTES + CELL_SCALES * CELL_SCALE_BYTES)
            case "bitsandbytes reordered":
                return packed + 2 * num_blocks + (0 if self.dense_element_bytes else packed + 4 * num_blocks)
            case _ if is_nested and len(out_features) == 1:
                return packed + num_blocks + 4 * -(-num_blocks // NESTED_BLOCK)
            case _:
                return packed + 4 * num_blocks

    def dense_bytes(self, in_features: int, out_features: tuple[int, ...]) -> int:
        """Of the same, kept written out beside it."""
        return self.dense_element_bytes * in_features * sum(out_features)

    def _product_of(self, in_features: int, out_features: tuple[int, ...]) -> Product:
        """What the form's own product does not take, bitsandbytes computes."""
        multiple = {"cpu": BLOCK_WEIGHTS, "gpu": CELL}.get(self.product)
        if multiple is not None:
            return "bitsandbytes" if in_features % multiple else self.product
        fits = in_features % BLOCK_WEIGHTS == 0 and all(out % 32 == 0 for out in out_features)
        return self.product if fits else "bitsandbytes"


def _product(config: EngineConfig, quantization: str, dtype: torch.dtype, device_type: str) -> Product:
    if device_type == "cuda" and not torch.cuda.is_available():
        return "gpu" if quantization == "nf4" else "bitsandbytes"
    try:
        kernels = select_kernels(torch.device(device_type), dtype, config.kernels).name
    except BackendUnavailable as error:
        raise ConfigError(f"--kernels {error}.") from error
    if kernels == "triton":
        return "gpu" if quantization == "nf4" else "bitsandbytes"
    if device_type == "cuda" or dtype == torch.float32 or not has_avx512bf16():
        return "bitsandbytes"
    is_ours = kernels == "compiled" and quantization == "nf4" and dtype == torch.bfloat16
    return "cpu" if is_ours else "bitsandbytes reordered"


def _panel_bytes(num_outputs: int, num_inputs: int) -> int:
    from heddle_kernels.cpu_kernels.nf4_panels import Nf4Panels  # needs numba

    with torch.device("meta"):
        return Nf4Panels.zeros(num_inputs, num_outputs).size_bytes
