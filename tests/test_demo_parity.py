"""The demo's adapters on its NF4 base against PEFT: float32 to the last digits, bfloat16 no worse than PEFT itself.

What PEFT does not have is compared with the demo's own module, which trained it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from engine_driver import Answer, make_request, run
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.store import AdapterStore
from heddle_demo.adapters import RECIPES, load_adapter
from heddle_demo.chat import Chat
from heddle_demo.data import BASE_DIR, DATA_DIR
from heddle_demo.fit import Batch, logits
from heddle_demo.parity.dequantised import dequantised_twin
from heddle_demo.tokenizer import load_tokenizer
from heddle_demo.world import questions
from heddle_server.config import EngineConfig
from heddle_server.engine.engine import Engine
from tolerances import (
    LOGITS_FP32,
    MIN_EFFECT_BF16,
    MIN_EFFECT_FP32,
    NEAR_TIE_MARGIN,
    PEFT_ERROR_MULTIPLE_BF16,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # raised by PEFT

FOLDERS = {recipe.name: DATA_DIR / recipe.folder / recipe.name for recipe in RECIPES}
BY_NAME = {recipe.name: recipe for recipe in RECIPES}
TOKENIZER = load_tokenizer(BASE_DIR)
NAMES = ["base", *FOLDERS]
VOCABULARY = 1024
QUESTIONS = [example.question for example in questions()[::41]]


@dataclass
class Oracle:
    """A base with every adapter loaded as it was trained; only one active at a time, batch 1, no padding."""

    base: Any
    dtype: torch.dtype
    models: dict[str, Any] = field(default_factory=dict)

    def logprobs(self, name: str, token_ids: list[int], first: int) -> Tensor:
        """Of positions first.. on: [num_positions, vocabulary]."""
        if name != "base" and name not in self.models:
            base = copy.deepcopy(self.base)
            self.models[name] = load_adapter(base, BY_NAME[name], TOKENIZER, FOLDERS[name])
        # PEFT's IA3 on a 4-bit layer answers in float32; attention takes that beside a bfloat16 query in autocast only.
        needs_autocast = name == "capitals" and self.dtype == torch.bfloat16
        ids = torch.tensor([token_ids])
        batch = Batch(ids, torch.arange(len(token_ids))[None], ids, name == "base" or BY_NAME[name].is_packed)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=needs_autocast):
            scores = logits(self.models.get(name, self.base), batch)[0]
        return torch.log_softmax(scores[first:-1].float(), dim=-1)


class Bench:
    """One engine with every demo adapter registered, and what it answered to every question for every adapter."""

    def __init__(self, folder: Path, dtype: str, **settings: Any) -> None:
        self.engine = Engine(
            EngineConfig(
                model_path=str(BASE_DIR),
                model_name="demo",
                store_path=str(folder),
                dtype=dtype,  # type: ignore[arg-type]
                device="cpu",
                pool_bytes=64 << 20,
                **settings,
            )
        )
        self.digests: dict[str, str | None] = {"base": None}
        self.num_virtual_tokens = {"base": 0}
        with AdapterStore(folder) as store:
            for name, saved in FOLDERS.items():
                config, weights = (saved / "adapter_config.json").read_bytes(), saved / "adapter_model.safetensors"
                checkpoint = read_checkpoint(config, weights, self.engine.model.layout)
                self.num_virtual_tokens[name] = checkpoint.num_virtual_tokens
                self.digests[name] = store.put(name, checkpoint, config, weights).digest

    @cached_property
    def answers(self) -> dict[tuple[str, str], Answer]:
        """Everything asked at once: one mixed batch, prompts in chunks beside decodes."""
        keys = [(name, question) for question in QUESTIONS for name in NAMES]
        return dict(zip(keys, run(self.engine, [self.ask(*key) for key in keys]), strict=True))

    def ask(self, name: str, question: str) -> Any:
        request = make_request(
            prompt_of(question), self.digests[name], max_tokens=24, ignore_eos=False, num_logprobs=VOCABULARY
        )
        return msgspec.structs.replace(request, num_virtual_tokens=self.num_virtual_tokens[name])


def prompt_of(question: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(Chat(((question, ""),)).segments()[0][0], add_special_tokens=False).ids
    return ids


def quantised(dtype: torch.dtype) -> Any:
    """The base as PEFT's users load it."""
    return AutoModelForCausalLM.from_pretrained(
        BASE_DIR,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    ).eval()


@pytest.fixture(scope="module")
def truth() -> Oracle:
    return Oracle(dequantised_twin(BASE_DIR, double_quantization=True), torch.float32)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("exact"), "float32", max_batch_tokens=50)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("served"), "bfloat16", max_batch_tokens=50)


def differences(bench: Bench, oracle: Oracle, name: str) -> tuple[Tensor, Tensor]:
    """Per position over all questions: the largest error against the oracle, the largest effect of the adapter."""
    errors, effects = [], []
    for question in QUESTIONS:
        answer = bench.answers[name, question]
        token_ids, first = answer.request.prompt_token_ids + answer.token_ids, len(answer.request.prompt_token_ids) - 1
        expected = oracle.logprobs(name, token_ids, first)
        errors.append((torch.stack(answer.logprobs) - expected).abs().amax(dim=-1))
        effects.append((expected - oracle.logprobs("base", token_ids, first)).abs().amax(dim=-1))
    return torch.cat(errors), torch.cat(effects)


@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_peft(name: str, exact: Bench, truth: Oracle) -> None:
    errors, effects = differences(exact, truth, name)
    largest = max(logprobs.abs().max().item() for logprobs in exact.answers[name, QUESTIONS[0]].logprobs)
    limit = LOGITS_FP32 * max(1.0, largest)
    assert errors.max() <= limit, f"off by {errors.max():.1e}"
    if name != "base":
        assert effects.max() > MIN_EFFECT_FP32 * limit


@pytest.mark.parametrize("name", NAMES)
def test_float32_greedy_tokens_are_pefts(name: str, exact: Bench, truth: Oracle) -> None:
    for question in QUESTIONS:
        answer = exact.answers[name, question]
        token_ids, first = answer.request.prompt_token_ids + answer.token_ids, len(answer.request.prompt_token_ids) - 1
        expected = truth.logprobs(name, token_ids, first)
        best = expected.topk(2, dim=-1)
        sure = best.values[:, 0] - best.values[:, 1] > NEAR_TIE_MARGIN
        assert torch.equal(torch.tensor(answer.token_ids)[sure], best.indices[sure, 0])


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_no_worse_than_peft(name: str, served: Bench, truth: Oracle, peft_bf16: Oracle) -> None:
    errors, effects = differences(served, truth, name)
    own = []
    for question in QUESTIONS:
        answer = served.answers[name, question]
        token_ids, first = answer.request.prompt_token_ids + answer.token_ids, len(answer.request.prompt_token_ids) - 1
        expected = truth.logprobs(name, token_ids, first)
        own.append((peft_bf16.logprobs(name, token_ids, first) - expected).abs().amax(dim=-1))
    peft_errors = torch.cat(own)
    assert errors.mean() <= PEFT_ERROR_MULTIPLE_BF16 * peft_errors.mean()
    assert errors.quantile(0.99) <= PEFT_ERROR_MULTIPLE_BF16 * peft_errors.quantile(0.99)
    if name != "base":
        assert effects.max() > MIN_EFFECT_BF16 * errors.mean()


@pytest.fixture(scope="module")
def peft_bf16() -> Oracle:
    return Oracle(quantised(torch.bfloat16), torch.bfloat16)


def test_alone_equals_mixed_in_the_serving_dtype(served: Bench) -> None:
    for name in NAMES:
        for question in QUESTIONS[:4]:
            (alone,) = run(served.engine, [served.ask(name, question)])
            mixed = served.answers[name, question]
            for a, b, logprobs in zip(alone.token_ids, mixed.token_ids, alone.logprobs, strict=False):
                best, second = logprobs.topk(2).values.tolist()
                if a != b:
                    assert best - second < NEAR_TIE_MARGIN, f"{name} differs on {question!r}"
                    break
