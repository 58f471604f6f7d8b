"""The whole engine over the Triton kernels, in the interpreter: the plain torch engine's answers, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine_driver import Answer, make_request, run
from heddle_kernels.triton_kernels.nf4_linear import Nf4Linear
from heddle_server.engine.engine import Engine
from test_engine import register
from test_families import make_engine, prompt_of
from tiny_models import VOCABULARY, save_tiny_model
from tolerances import ENGINE_LOGPROBS

SHAPE = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def digests(folder: Path) -> list[str]:
    """Of low-rank adapters of two ranks, and of one that scales inputs and outputs."""
    model = save_tiny_model(folder, "llama", **SHAPE)
    return register(folder, make_engine(folder), model, ("lora", "ia3_feedforward", "lora"))


def make(folder: Path, **settings: Any) -> Engine:
    return make_engine(folder, quantization="nf4", pool_bytes=1 << 23, **settings)


def ask(engine: Engine, digests: list[str]) -> list[Answer]:
    """One prompt for several chunks, short ones, and a base request; every logprob."""
    prompts = [prompt_of(length, length) for length in (18, 5, 1, 3)]
    uses = [digests[0], digests[1], None, digests[2]]
    requests = [
        make_request(prompt, use, max_tokens=3, num_logprobs=VOCABULARY)
        for prompt, use in zip(prompts, uses, strict=True)
    ]
    return run(engine, requests)


@pytest.fixture(scope="module")
def triton(folder: Path, digests: list[str]) -> Engine:
    """Overlapping steps, as on a GPU, and decode steps over the memory that graphs would read."""
    return make(folder, kernels="triton", overlap="on", max_batch_tokens=16)


def test_answers_as_plain_torch_does(triton: Engine, folder: Path, digests: list[str]) -> None:
    linears = [module for module in triton._runner._model.modules() if isinstance(module, Nf4Linear)]
    assert len(linears) == 4 * SHAPE["num_hidden_layers"], "q/k/v, o, gate/up and down"
    plain = make(folder, kernels="reference")
    for expected, actual in zip(ask(plain, digests), ask(triton, digests), strict=True):
        assert actual.error_code is None
        assert actual.token_ids == expected.token_ids
        for ours, theirs in zip(actual.logprobs, expected.logprobs, strict=True):
            assert torch.allclose(ours, theirs, atol=ENGINE_LOGPROBS)
    graphs = triton._runner._graphs
    assert graphs is not None
    assert {capacity for capacity, *_ in graphs._steps} <= {1, 2, 4}, "decode steps ran over static memory"
    assert any(scaled for _, scaled, _ in graphs._steps), "also with an adapter that scales inputs"
