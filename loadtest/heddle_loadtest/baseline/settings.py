"""What a baseline is asked to serve, and how. Imports no torch, so that the command line may read it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from heddle_loadtest.errors import SpecError

MAX_PORT = 65535


class BaselineKind(StrEnum):
    """How others serve many adapters over one base."""

    PEFT_MIXED = "peft-mixed"  # static batches; PEFT's `adapter_names` mixes adapters in one
    PEFT_GROUPED = "peft-grouped"  # static batches of one adapter
    TRANSFORMERS_CB_GROUPED = "transformers-cb-grouped"  # continuous batches of one adapter


class Device(StrEnum):
    """Where the model computes."""

    AUTO = "auto"  # an NVIDIA GPU if there is one
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """What it computes in."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Quantization(StrEnum):
    """What the base's linears are kept in."""

    NF4 = "nf4"  # bitsandbytes, scales quantised as well
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class BaselineSettings:
    """Validated on construction: SpecError names the field that is wrong."""

    kind: BaselineKind
    base: Path  # a transformers folder
    adapters: Path  # holds one PEFT folder per adapter
    host: str = "127.0.0.1"
    port: int = 8001  # 0: any that is free
    max_batch: int = 32  # requests computed together
    max_wait_seconds: float = 0.02  # how long a static batch waits for more once its first request is there
    switch_seconds: float = 5.0  # a continuous batch takes no more for its adapter once another's waits for longer
    device: Device = Device.AUTO
    dtype: Dtype = Dtype.BFLOAT16
    quantization: Quantization = Quantization.NF4
    num_threads: int | None = None  # None: as torch chooses
    model_name: str = "base"  # what the base is called in /v1/models

    def __post_init__(self) -> None:
        if not (self.base / "config.json").is_file():
            raise SpecError("base", self.base, "no transformers model lies there", "Name a folder with a config.json")
        if not 0 <= self.port <= MAX_PORT:
            raise SpecError("port", self.port, "no such port", f"Choose one from 0 to {MAX_PORT}")
        for field in ("max_batch", "num_threads"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise SpecError(field, value, "too few", "Choose at least 1")
        for field in ("max_wait_seconds", "switch_seconds"):
            if getattr(self, field) < 0:
                raise SpecError(field, getattr(self, field), "negative", "Choose 0s or longer")
        if not self.model_name:
            raise SpecError("model_name", self.model_name, "empty", "Give the base a name")
