"""A tiny base with one adapter of each kind registered, and PEFT's own model of each: the oracle at batch 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine_driver import Answer, make_request
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.mix import AdapterPart
from heddle_adapters.store import AdapterStore
from heddle_server.config import EngineConfig
from heddle_server.engine.engine import Engine
from peft_samples import KINDS, make_adapter
from tolerances import LOGITS_FP32, MIN_EFFECT_FP32

VOCABULARY = 128
RANKS = {"lora": 8, "rslora": 16, "patterns": 5, "lora_bias": 3}
SETTINGS: dict[str, Any] = {
    "quantization": "none",
    "dtype": "float32",
    "device": "cpu",
    "pool_bytes": 1 << 22,
    "max_batch_tokens": 32,  # so that longer prompts are computed in chunks, beside other requests' decodes
}


@dataclass
class Bench:
    """One tiny base with one adapter of each kind registered, and PEFT's own model of each."""

    engine: Engine
    base: Any
    folder: Path  # each kind as PEFT saved it, under its name
    peft: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str | None] = field(default_factory=dict)

    def register(self, name: str, kind: str, seed: int) -> None:
        """Make a random adapter with PEFT and store it."""
        saved = self.folder / name
        self.peft[name] = make_adapter(self.base, kind, saved, rank=RANKS.get(kind, 4), seed=seed)
        config, weights = (saved / "adapter_config.json").read_bytes(), saved / "adapter_model.safetensors"
        with AdapterStore(self.folder / "store") as store:
            checkpoint = read_checkpoint(config, weights, self.engine.model.layout)
            self.digests[name] = store.put(name, checkpoint, config, weights).digest

    def part(self, kind: str, scale: float) -> AdapterPart:
        digest = self.digests[kind]
        assert digest is not None, "the base is no part of a mix"
        return AdapterPart(digest, scale)


def make_bench(make_model: Callable[[], Any], folder: Path) -> Bench:
    base = make_model()
    base.save_pretrained(folder / "model")
    engine = Engine(
        EngineConfig(model_path=str(folder / "model"), model_name="tiny", store_path=str(folder / "store"), **SETTINGS)
    )
    bench = Bench(engine, base, folder, digests={"base": None})
    for number, kind in enumerate(KINDS):
        bench.register(kind, kind, seed=number)
    return bench


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def ask(bench: Bench, kind: str, length: int) -> Any:
    return make_request(prompt_of(length), bench.digests[kind], max_tokens=5, num_logprobs=VOCABULARY)


def logits_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Batch 1, no padding: [num_tokens, vocabulary]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0].float()
    return logits


def assert_is_peft(bench: Bench, kind: str, answer: Answer) -> None:
    assert_equals(answer, bench.peft.get(kind, bench.base), bench.base)


def assert_equals(answer: Answer, oracle: Any, base: Any) -> None:
    """Every answered position has the oracle's logits, and, unless it is the base itself, not the base's."""
    assert answer.error_message is None
    assert len(answer.token_ids) == 5
    token_ids = answer.request.prompt_token_ids + answer.token_ids
    expected, plain = logits_of(oracle, token_ids), logits_of(base, token_ids)
    for number, logprobs in enumerate(answer.logprobs):
        position = len(answer.request.prompt_token_ids) - 1 + number
        limit = LOGITS_FP32 * expected[position].abs().clamp(min=1)
        actual = logprobs + torch.logsumexp(expected[position], dim=-1)
        assert ((actual - expected[position]).abs() <= limit).all(), f"position {position} is off"
        if oracle is not base:
            effect = (expected[position] - plain[position]).abs().max()
            assert effect > MIN_EFFECT_FP32 * limit.max(), "the adapter's effect is too small to prove anything"
