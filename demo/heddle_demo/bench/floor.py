"""What a decode step must at least read from memory. Knows no server and no clock."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from heddle_adapters.base_layout import BaseLayout

# NF4 as bitsandbytes stores it with nested statistics: 4 bit a weight, 8 bit of scale a block of 64 weights, 32 bit a
# group of 256 such scales.
NF4_BYTES_PER_WEIGHT = 1 / 2 + 1 / 64 + 4 / (64 * 256)
DTYPE_BYTES = 2  # bfloat16: what is not in 4 bit, the KV cache


@dataclass(frozen=True)
class BaseBytes:
    """What the demo's base costs in memory traffic; the embedding is also the output layer."""

    weights: int  # read once a step
    kv_per_token: int

    @classmethod
    def of(cls, model_path: Path, layout: BaseLayout) -> Self:
        config = json.loads((model_path / "config.json").read_text())
        num_linear_weights = sum(site.in_features * site.out_features for site in layout.sites)
        output_layer = config["vocab_size"] * config["hidden_size"] * DTYPE_BYTES
        kv_width = config["num_key_value_heads"] * config["head_dim"]
        return cls(
            weights=math.ceil(num_linear_weights * NF4_BYTES_PER_WEIGHT) + output_layer,
            kv_per_token=2 * config["num_hidden_layers"] * kv_width * DTYPE_BYTES,
        )


@dataclass(frozen=True)
class Floor:
    """One decode step's bytes over the machine's bandwidth, beside what a step took."""

    weight_bytes: int
    adapter_bytes: int
    kv_bytes: int
    bandwidth_bytes_per_second: float
    measured_step_seconds: float  # mean over prefill and decode steps

    @property
    def floor_seconds(self) -> float:
        return (self.weight_bytes + self.adapter_bytes + self.kv_bytes) / self.bandwidth_bytes_per_second

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "floor_seconds": self.floor_seconds}
