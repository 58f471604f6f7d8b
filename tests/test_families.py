"""Every model family equals transformers' own logits, also beside a long neighbour and with chunked prefill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from engine_driver import Answer, make_request, run
from heddle_server.config import EngineConfig
from heddle_server.engine.engine import Engine
from tiny_models import FAMILIES, VOCABULARY, save_tiny_model
from tolerances import LOGITS_FP32


def make_engine(folder: Path, **settings: Any) -> Engine:
    options = {"quantization": "none", "dtype": "float32", "device": "cpu", "pool_bytes": 1 << 22}
    paths = {"model_path": str(folder), "model_name": "tiny", "store_path": str(folder)}
    return Engine(EngineConfig(**{**options, **paths, **settings}))


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_equals_transformers(answer: Answer, model: PreTrainedModel) -> None:
    """Each token's distribution against one plain forward over the whole sequence."""
    token_ids = answer.request.prompt_token_ids + answer.token_ids
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids]), use_cache=False).logits[0].float()
    first = len(answer.request.prompt_token_ids) - 1
    for position, logprobs in enumerate(answer.logprobs, start=first):
        logits = expected[position]
        actual = logprobs + torch.logsumexp(logits, dim=-1)
        worst = ((actual - logits).abs() / logits.abs().clamp(min=1)).max().item()
        assert worst <= LOGITS_FP32, f"position {position}: off by {worst:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_alone_mixed_and_chunked(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, family)
    engine = make_engine(tmp_path, max_batch_tokens=40)  # the long prompt takes several chunks
    prompts = [prompt_of(5, 1), prompt_of(150, 2), prompt_of(33, 3), prompt_of(17, 4)]
    requests = [make_request(prompt, max_tokens=6, num_logprobs=VOCABULARY) for prompt in prompts]
    for answer in run(engine, requests):
        assert len(answer.token_ids) == 6
        assert_equals_transformers(answer, model)
    (alone,) = run(engine, [make_request(prompts[0], max_tokens=6, num_logprobs=VOCABULARY)])
    assert_equals_transformers(alone, model)
