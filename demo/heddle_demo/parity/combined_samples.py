"""Several methods in one adapter, against the same methods put onto one model one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heddle_adapters.combine import combine
from heddle_demo.parity.formula_samples import BottleneckSample
from heddle_demo.parity.peft_sample import BaseOracle, PeftOracle, PeftSample
from heddle_demo.parity.peft_samples import lora, prefix_tuning
from heddle_demo.parity.sample import Oracle

LORA = PeftSample("lora", lambda base: lora())
PREFIX = PeftSample("prefix", prefix_tuning)


@dataclass(frozen=True)
class CombinedSample:
    """Parts in the order in which an oracle puts them onto the model; a prefix comes last."""

    name: str
    parts: Sequence[tuple[float, PeftSample | BottleneckSample]]  # (gate, what it multiplies)
    on_plain_base_only: bool = False
    oracle_name: str = "its parts"

    def save(self, base: Any, folder: Path, seed: int) -> None:
        folders = []
        for number, (gate, sample) in enumerate(self.parts):
            own = self._part_folder(folder, number)
            own.mkdir(parents=True)
            sample.save(base, own, seed + number)
            folders.append((f"part{number}", gate, own))
        combine(folders, folder)

    def load(self, base: Any, folder: Path) -> Oracle:
        model, oracle = base, None
        for number, (gate, sample) in enumerate(self.parts):
            oracle = sample.load(model, self._part_folder(folder, number), gate)
            is_prefix = isinstance(oracle, PeftOracle) and sample is PREFIX
            model = oracle.model if isinstance(oracle, BaseOracle) or is_prefix else oracle.model.base_model.model
        assert oracle is not None, "there are parts"
        return oracle

    @staticmethod
    def _part_folder(folder: Path, number: int) -> Path:
        return folder / "parts" / str(number)


COMBINED_SAMPLES = (
    CombinedSample("LoRA + prefix (HyperTuning)", [(1.0, LORA), (1.0, PREFIX)]),
    CombinedSample(
        "parallel bottleneck + prefix (MAM)",
        [(1.0, BottleneckSample("bottleneck", False, "parallel", "relu")), (1.0, PREFIX)],
    ),
    CombinedSample(
        "gated sum with a prefix (UniPELT)",
        [(0.7, LORA), (0.5, BottleneckSample("bottleneck", False, "stream", "relu")), (1.0, PREFIX)],
    ),
)
