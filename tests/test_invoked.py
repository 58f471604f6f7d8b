"""An adapter that acts from its invocation on, against PEFT: what comes before is the base's, and shared with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from engine_driver import Answer, make_request, run
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.store import AdapterStore
from heddle_demo.parity.peft_sample import PeftOracle, PeftSample
from heddle_server.config import EngineConfig
from heddle_server.engine.engine import Engine
from heddle_server.messages import TokenLogprobs
from parity_bench import SETTINGS, VOCABULARY, logits_of, prompt_of
from peft_samples import tiny_llama
from tolerances import LOGITS_FP32, MIN_EFFECT_FP32

INVOCATION = [5, 9]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
SAMPLE = PeftSample(
    "invoked",
    lambda base: LoraConfig(
        r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION
    ),
)
TEXT = [token for token in prompt_of(60) if token not in INVOCATION][:40]
PROMPTS = {
    "in the middle": [*TEXT, *INVOCATION, *TEXT[:9]],
    "at the start": [*INVOCATION, *TEXT],
    "at the end": [*TEXT[:20], *INVOCATION],
    "twice": [*TEXT[:8], *INVOCATION, *TEXT[8:30], *INVOCATION, *TEXT[:3]],
    "nowhere": TEXT,
}


class Bench:
    """An engine with one such adapter, and PEFT's own model of it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.base = tiny_llama()
        self.base.save_pretrained(folder / "model")
        SAMPLE.save(self.base, folder / "adapter", seed=3)
        self.peft: PeftOracle = SAMPLE.load(self.base, folder / "adapter")
        options: dict[str, Any] = {
            "model_path": str(folder / "model"),
            "model_name": "tiny",
            "store_path": str(folder / "store"),
        }
        self.engine = Engine(EngineConfig(**options, **{**SETTINGS, **settings}))
        config = (folder / "adapter" / "adapter_config.json").read_bytes()
        weights = folder / "adapter" / "adapter_model.safetensors"
        with AdapterStore(folder / "store") as store:
            checkpoint = read_checkpoint(config, weights, self.engine.model.layout)
            self.digest = store.put("invoked", checkpoint, config, weights).digest

    def ask(self, questions: list[tuple[str | None, list[int]]]) -> list[Answer]:
        """(adapter, prompt) each, all at once."""
        requests = [make_request(prompt, name, max_tokens=5, num_logprobs=VOCABULARY) for name, prompt in questions]
        answers = run(self.engine, requests)
        for (name, prompt), answer in zip(questions, answers, strict=True):
            self._check(name, prompt, answer)
        return answers

    def _check(self, name: str | None, prompt: list[int], answer: Answer) -> None:
        assert answer.error_message is None
        token_ids = prompt + answer.token_ids
        answered = slice(len(prompt) - 1, len(token_ids) - 1)
        base = logits_of(self.base, token_ids)[answered]
        expected = base if name is None else self.peft.logits(token_ids, len(prompt))[answered]
        limit = LOGITS_FP32 * expected.abs().clamp(min=1)
        actual = torch.stack(answer.logprobs) + expected.logsumexp(dim=-1, keepdim=True)
        assert ((actual - expected).abs() <= limit).all()
        if name is not None and prompt != PROMPTS["nowhere"]:
            assert (expected - base).abs().max() > MIN_EFFECT_FP32 * limit.max()


@pytest.fixture(
    params=[{}, {"overlap": "on"}, {"max_batch_tokens": 24}, {"kernels": "reference"}],
    ids=["plain", "overlapping", "in chunks", "reference"],
)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, **request.param)
    yield bench
    bench.engine.close()


def test_wherever_it_is_invoked_beside_the_base_and_again(bench: Bench) -> None:
    questions = [(name, prompt) for prompt in PROMPTS.values() for name in (None, bench.digest)]
    bench.ask(questions)
    assert all(answer.num_cached_tokens for answer in bench.ask(questions[::-1]))


def test_what_comes_before_is_shared_with_the_base(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    prompt = PROMPTS["in the middle"]  # 40 tokens before the invocation, two whole pages; 51 in all, three
    cached = [bench.ask([(name, prompt)])[0].num_cached_tokens for name in (None, bench.digest, bench.digest, None)]
    assert cached == [0, 32, 48, 48]
    bench.engine.close()


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_every_token_of_the_prompt_is_scored_by_whoever_computes_it(bench: Bench, prompt: list[int]) -> None:
    """The output head is changed too, for some tokens of the same chunk."""
    request = make_request(prompt, bench.digest, max_tokens=2, num_logprobs=0, num_prompt_logprobs=0)
    bench.engine.add(request)
    bench.engine.add(make_request(prompt, max_tokens=2))
    scored: tuple[TokenLogprobs, ...] = ()
    while bench.engine.has_requests:
        for output in bench.engine.step():
            assert output.error_message is None
            scored += output.prompt_logprobs or ()
        bench.engine.check_integrity()
    expected = torch.log_softmax(bench.peft.logits(prompt, len(prompt)), dim=-1)
    assert [each.logprob for each in scored] == pytest.approx(
        [expected[position, token_id].item() for position, token_id in enumerate(prompt[1:])], abs=1e-4
    )
