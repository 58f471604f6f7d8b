"""Adapters against PEFT at batch 1: alone, all in one batch with the base, chunked, from a warm prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engine_driver import Answer, make_request, run
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.store import AdapterStore
from heddle_server.config import EngineConfig
from heddle_server.engine.engine import Engine
from peft_samples import KINDS, make_adapter, tiny_gpt2, tiny_llama, tiny_qwen2
from tolerances import LOGITS_FP32, MIN_EFFECT_FP32

pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # PEFT, of merging, which nobody does

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
    peft: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str | None] = field(default_factory=dict)

    def logits(self, kind: str, token_ids: list[int]) -> torch.Tensor:
        """PEFT's (or the base's) logits, batch 1, no padding: [num_tokens, vocabulary]."""
        with torch.inference_mode():
            model = self.peft.get(kind, self.base)
            logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0].float()
        return logits


@pytest.fixture(scope="module", params=[tiny_llama, tiny_qwen2, tiny_gpt2], ids=["llama", "qwen2", "gpt2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    make_model: Callable[[], Any] = request.param
    folder = tmp_path_factory.mktemp("base")
    base = make_model()
    base.save_pretrained(folder / "model")
    engine = Engine(
        EngineConfig(model_path=str(folder / "model"), model_name="tiny", store_path=str(folder / "store"), **SETTINGS)
    )
    bench = Bench(engine, base, digests={"base": None})
    with AdapterStore(folder / "store") as store:
        for number, kind in enumerate(KINDS):
            saved = folder / kind
            bench.peft[kind] = make_adapter(base, kind, saved, rank=RANKS.get(kind, 4), seed=number)
            config, weights = (saved / "adapter_config.json").read_bytes(), saved / "adapter_model.safetensors"
            checkpoint = read_checkpoint(config, weights, engine.model.layout)
            bench.digests[kind] = store.put(kind, checkpoint, config, weights).digest
    return bench


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def ask(bench: Bench, kind: str, length: int) -> Any:
    return make_request(prompt_of(length), bench.digests[kind], max_tokens=5, num_logprobs=VOCABULARY)


def assert_is_peft(bench: Bench, kind: str, answer: Answer) -> None:
    assert answer.error_message is None
    assert len(answer.token_ids) == 5
    token_ids = answer.request.prompt_token_ids + answer.token_ids
    expected, plain = bench.logits(kind, token_ids), bench.logits("base", token_ids)
    for number, logprobs in enumerate(answer.logprobs):
        position = len(answer.request.prompt_token_ids) - 1 + number
        limit = LOGITS_FP32 * expected[position].abs().clamp(min=1)
        actual = logprobs + torch.logsumexp(expected[position], dim=-1)
        assert ((actual - expected[position]).abs() <= limit).all(), f"{kind}: position {position} is off"
        if kind != "base":
            effect = (expected[position] - plain[position]).abs().max()
            assert effect > MIN_EFFECT_FP32 * limit.max(), "the adapter's effect is too small to prove anything"


@pytest.mark.parametrize("kind", ["base", *KINDS])
def test_alone(bench: Bench, kind: str) -> None:
    (answer,) = run(bench.engine, [ask(bench, kind, 20)])
    assert_is_peft(bench, kind, answer)


def test_all_in_one_batch_with_chunked_prefill(bench: Bench) -> None:
    kinds = ["base", *KINDS, "base", *reversed(KINDS)]
    lengths = [70 - 3 * number for number in range(len(kinds))]
    answers = run(bench.engine, [ask(bench, kind, n) for kind, n in zip(kinds, lengths, strict=True)])
    for kind, answer in zip(kinds, answers, strict=True):
        assert_is_peft(bench, kind, answer)


def test_warm_prefix_cache(bench: Bench) -> None:
    kinds = ["base", *KINDS]
    first = run(bench.engine, [ask(bench, kind, 50) for kind in kinds])
    again = run(bench.engine, [ask(bench, kind, 50) for kind in kinds])
    for kind, cold, warm in zip(kinds, first, again, strict=True):
        assert warm.num_cached_tokens == 48, "three full pages of the same prompt under the same adapter"
        assert warm.token_ids == cold.token_ids
        assert_is_peft(bench, kind, warm)


def test_order_of_requests_does_not_matter(bench: Bench) -> None:
    kinds = ["base", *KINDS]
    forward = run(bench.engine, [ask(bench, kind, 25) for kind in kinds])
    backward = run(bench.engine, [ask(bench, kind, 25) for kind in reversed(kinds)])
    assert [a.token_ids for a in forward] == [a.token_ids for a in reversed(backward)]


def test_after_eviction_and_reload(bench: Bench) -> None:
    loads = bench.engine.stats().num_adapter_loads
    for digest in filter(None, bench.digests.values()):
        bench.engine.forget_adapter(digest)
    assert bench.engine.stats().num_resident_adapters == 0
    kinds = ["base", *KINDS]
    for kind, answer in zip(kinds, run(bench.engine, [ask(bench, kind, 30) for kind in kinds]), strict=True):
        assert_is_peft(bench, kind, answer)
    assert bench.engine.stats().num_adapter_loads == loads + len(KINDS)


def test_nothing_is_left_when_all_have_ended(bench: Bench) -> None:
    run(bench.engine, [ask(bench, kind, 20) for kind in ["base", *KINDS]])
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_pages) == (0, 0, 0)
    assert stats.num_free_pages + stats.num_cached_pages + stats.num_adapter_pages == stats.num_pages
