"""What one run of `heddle bench serving` came to, and what follows from it. Prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from heddle_demo.bench.agreement import Agreement
from heddle_demo.bench.floor import BaseBytes
from heddle_demo.bench.generation import Generation
from heddle_demo.bench.mixes import MIXES, num_distinct
from heddle_demo.bench.ratio import Ratio
from heddle_demo.bench.serving_plan import ServingPlan

SCHEMA_VERSION = 1  # of to_json(); counts up when a field changes its meaning or goes away, not when one is added


@dataclass(frozen=True)
class Turn:
    """One batch that one arm answered."""

    arm: str
    mix: str
    round: int
    generation: Generation

    def to_json(self) -> dict[str, Any]:
        generation = self.generation
        return {
            "arm": self.arm,
            "mix": self.mix,
            "round": self.round,
            "seconds": generation.seconds,
            "tokens_per_second": generation.tokens_per_second,
            "prefill_seconds": generation.prefill_seconds,
            "decode_tokens_per_second": generation.decode_tokens_per_second,
        }


@dataclass(frozen=True)
class ArmSummary:
    """One arm under one mix: medians over the rounds."""

    tokens_per_second: float
    rounds_tokens_per_second: list[float]
    prefill_seconds: float | None
    decode_tokens_per_second: float | None
    rounds_decode_tokens_per_second: list[float] | None

    @classmethod
    def of(cls, generations: Sequence[Generation]) -> ArmSummary:
        rates = [generation.tokens_per_second for generation in generations]
        prefills = [g.prefill_seconds for g in generations if g.prefill_seconds is not None]
        decodes = [rate for g in generations if (rate := g.decode_tokens_per_second) is not None]
        return cls(
            tokens_per_second=median(rates),
            rounds_tokens_per_second=rates,
            prefill_seconds=median(prefills) if prefills else None,
            decode_tokens_per_second=median(decodes) if decodes else None,
            rounds_decode_tokens_per_second=decodes or None,
        )


@dataclass(frozen=True)
class ServingResults:
    """One whole run."""

    plan: ServingPlan
    machine: dict[str, Any]
    device: str
    num_threads: int
    base_bytes: BaseBytes
    row_bytes: int  # of one adapter
    turns: tuple[Turn, ...]  # in the order of measuring
    peft: dict[str, Any] | None = None  # how PEFT was set up
    agreements: tuple[Agreement, ...] = ()
    adapter_effect: float | None = None  # least difference that an adapter makes, measured like the agreements' error

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(turn.arm for turn in self.turns))

    def summary(self, arm: str, mix: str) -> ArmSummary:
        return ArmSummary.of(self._generations(arm, mix))

    def against_peft(self, mix: str) -> Ratio | None:
        """heddle's tokens per second over PEFT's, prompts included; None where PEFT was not asked."""
        if "peft" not in self.arms:
            return None
        theirs, ours = (self.summary(arm, mix).rounds_tokens_per_second for arm in ("peft", "heddle"))
        return Ratio.of(theirs, ours)

    def retention(self, mix: str) -> Ratio | None:
        """heddle's decode speed under this mix over that of its own base alone; None where either is missing."""
        if not {"base", mix} <= set(self.plan.mixes):
            return None
        base, mixed = (self.summary("heddle", name).rounds_decode_tokens_per_second for name in ("base", mix))
        return None if base is None or mixed is None else Ratio.of(base, mixed)

    def floor_retention(self, mix: str) -> float:
        """The best retention there can be where only reading memory takes time."""
        return self._step_bytes(0) / self._step_bytes(self.num_distinct(mix))

    def num_distinct(self, mix: str) -> int:
        """Different adapters in a batch of this mix."""
        return num_distinct(MIXES[mix](self.plan.batch, self.plan.num_adapters))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, single turns last."""
        ratios = {mix: self.against_peft(mix) for mix in self.plan.mixes}
        retentions = {mix: self.retention(mix) for mix in self.plan.mixes if mix != "base"}
        return {
            "schema_version": SCHEMA_VERSION,
            "bench": "serving",
            "machine": self.machine,
            "device": self.device,
            "num_threads": self.num_threads,
            "plan": self.plan.to_json(),
            **{f"{mix}_vs_peft": ratio.value for mix, ratio in ratios.items() if ratio is not None},
            **{f"{mix}_retention": ratio.value for mix, ratio in retentions.items() if ratio is not None},
            "arms": {arm: {mix: asdict(self.summary(arm, mix)) for mix in self.plan.mixes} for arm in self.arms},
            "ratios": {mix: ratio.to_json() for mix, ratio in ratios.items() if ratio is not None},
            "retentions": {
                mix: {**ratio.to_json(), "floor": self.floor_retention(mix)}
                for mix, ratio in retentions.items()
                if ratio is not None
            },
            "peft": self.peft,
            "adapter_effect": self.adapter_effect,
            "agreement": [agreement.to_json() for agreement in self.agreements],
            "turns": [turn.to_json() for turn in self.turns],
        }

    def _generations(self, arm: str, mix: str) -> list[Generation]:
        return [turn.generation for turn in self.turns if (turn.arm, turn.mix) == (arm, mix)]

    def _step_bytes(self, num_adapters: int) -> float:
        """What a decode step reads halfway through an answer."""
        num_cached = self.plan.batch * (self.plan.num_prompt_tokens + self.plan.num_new_tokens / 2)
        return self.base_bytes.weights + num_adapters * self.row_bytes + num_cached * self.base_bytes.kv_per_token
