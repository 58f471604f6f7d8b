"""An engine's answers where an adapter's own tokens, pages and positions meet the prefix cache, against PEFT.

That these methods are right in any batch is the parity samples' business; here prefixes are found again, copied,
given back and scored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from engine_driver import Answer, make_request, run
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.store import AdapterStore
from heddle_demo.parity.peft_sample import quiet, randomise
from heddle_server.config import PAGE_TOKENS, EngineConfig
from heddle_server.engine.engine import Engine
from heddle_server.messages import TokenLogprobs
from heddle_server.request import Request
from parity_bench import SETTINGS, VOCABULARY
from peft_samples import tiny_llama
from tolerances import LOGITS_FP32, MIN_EFFECT_FP32

NUM_VIRTUAL = PAGE_TOKENS + 4  # a whole page and the beginning of one
METHODS: dict[str, Callable[..., Any]] = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
MAX_TOKENS = 6


@dataclass
class Served:
    """An engine, what it serves, and PEFT's own model of each."""

    engine: Engine
    base: Any
    digests: dict[str, str] = field(default_factory=dict)
    peft: dict[str, Any] = field(default_factory=dict)

    def request(self, name: str, prompt: list[int], **options: Any) -> Request:
        options = {"max_tokens": MAX_TOKENS, "num_logprobs": VOCABULARY, **options}
        request = make_request(prompt, self.digests[name] if name else None, **options)
        return msgspec.structs.replace(request, num_virtual_tokens=NUM_VIRTUAL if name else 0)

    def logits(self, name: str, token_ids: list[int]) -> Tensor:
        """[num_tokens, vocabulary]"""
        with torch.inference_mode(), quiet():
            logits: Tensor = (self.peft[name] if name else self.base)(torch.tensor([token_ids]), use_cache=False).logits
        return logits[0, -len(token_ids) :]  # virtual tokens have logits too

    def check(self, name: str, answer: Answer) -> None:
        """Every logit of the answer is PEFT's, and the adapter's effect is large enough to prove it."""
        assert answer.error_message is None
        token_ids, first = answer.request.prompt_token_ids + answer.token_ids, len(answer.request.prompt_token_ids) - 1
        expected, base = (self.logits(each, token_ids)[first:-1] for each in (name, ""))
        limit = LOGITS_FP32 * expected.abs().clamp(min=1)
        actual = torch.stack(answer.logprobs) + expected.logsumexp(dim=-1, keepdim=True)
        assert ((actual - expected).abs() <= limit).all()
        assert not name or (expected - base).abs().max() > MIN_EFFECT_FP32 * limit.max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder / "model")
    return folder


def serve(folder: Path, **settings: Any) -> Served:
    """One adapter of each method, each with its name."""
    base = tiny_llama()
    config = EngineConfig(
        model_path=str(folder / "model"),
        model_name="tiny",
        store_path=str(folder / "store"),
        **{**SETTINGS, **settings},
    )
    served = Served(Engine(config), base)
    for seed, (name, method) in enumerate(METHODS.items()):
        sizes = {"token_dim": 64, "num_layers": 2, "num_attention_heads": 4}
        with quiet():
            torch.manual_seed(seed)
            config_of_method = method(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL, **sizes)
            model = get_peft_model(copy.deepcopy(base), config_of_method).eval()
            randomise(model, 0.3, noise=0.3, seed=seed)
            model.save_pretrained(folder / name)
        config_bytes = (folder / name / "adapter_config.json").read_bytes()
        weights = folder / name / "adapter_model.safetensors"
        with AdapterStore(folder / "store") as store:
            checkpoint = read_checkpoint(config_bytes, weights, served.engine.model.layout)
            served.digests[name] = store.put(name, checkpoint, config_bytes, weights).digest
        served.peft[name] = model
    return served


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_found_again_is_right(folder: Path, name: str, overlap: str) -> None:
    served = serve(folder, overlap=overlap)
    prompt = prompt_of(50, 1)
    cached = list[int]()
    for length in (
        50,
        50,
        20,
        9,
    ):  # the second finds all whole pages, the third the one that begins with virtual tokens
        (answer,) = run(served.engine, [served.request(name, prompt[:length])])
        served.check(name, answer)
        cached.append(answer.num_cached_tokens)
    assert cached == [0, 4 * PAGE_TOKENS - NUM_VIRTUAL, 2 * PAGE_TOKENS - NUM_VIRTUAL, 0]
    served.engine.close()


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_many_at_once_share_what_the_adapter_brings(folder: Path, overlap: str) -> None:
    served = serve(folder, overlap=overlap)
    asked = [(name, prompt_of(length, length)) for name in ("prefix", "", "prompt") for length in (1, 12, 13, 40)]
    answers = run(served.engine, [served.request(name, prompt) for name, prompt in asked])
    for (name, _), answer in zip(asked, answers, strict=True):
        served.check(name, answer)
    served.engine.close()


def test_who_is_put_back_and_comes_again_is_answered_right(folder: Path) -> None:
    page_bytes = serve(folder).engine.model.page_bytes
    served = serve(folder, pool_bytes=14 * page_bytes, max_model_len=96)
    asked = [("prefix", prompt_of(20 + number, number)) for number in range(5)]
    answers = run(served.engine, [served.request(name, prompt, max_tokens=30) for name, prompt in asked])
    assert served.engine.stats().num_preemptions > 0
    for (name, _), answer in zip(asked, answers, strict=True):
        served.check(name, answer)
    served.engine.close()


@pytest.mark.parametrize("name", METHODS)
def test_the_prompts_own_tokens_are_scored(folder: Path, name: str) -> None:
    served = serve(folder)
    prompt = prompt_of(40, 2)
    expected = torch.log_softmax(served.logits(name, prompt).float(), dim=-1)
    for _ in range(2):
        served.engine.add(served.request(name, prompt, num_prompt_logprobs=0))
        scored: tuple[TokenLogprobs, ...] = ()
        while served.engine.has_requests:
            for output in served.engine.step():
                assert output.error_message is None
                scored += output.prompt_logprobs or ()
            served.engine.check_integrity()
        assert [each.logprob for each in scored] == pytest.approx(
            [expected[position, token_id].item() for position, token_id in enumerate(prompt[1:])], abs=1e-4
        )
    served.engine.close()
