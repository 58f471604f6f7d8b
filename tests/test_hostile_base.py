"""Whatever is uploaded, the base stays what it was: its weights, and what it answers beside the strangest adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from engine_driver import make_request, run
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.store import AdapterStore
from heddle_server.engine.engine import Engine
from hostile_case import Upload
from hostile_uploads import hostile_uploads
from odd_uploads import odd_uploads
from test_families import make_engine, prompt_of
from tiny_models import save_tiny_model

# A base with the very widths of `adapter_samples.BASE`, so that everything aimed at that hits this one too.
WIDTHS = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
AIMED_AT_TENSORS = (
    "base key",
    "tenant key",
    "name",
    "part",
    "module",
    "value",
    "half",
    "tensor",
    "IA3",
    "rank",
    "alpha",
)
PROMPTS = [prompt_of(length, length) for length in (5, 9, 17, 30)]


@pytest.fixture(params=["none", "nf4"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=1, **WIDTHS)
    folder = str(tmp_path / "model")
    # Room for a few adapters only, so that their pages and slots change hands.
    settings = {"quantization": request.param, "pool_bytes": 16 << 10, "store_path": str(tmp_path / "store")}
    with closing(make_engine(Path(folder), **settings)) as engine:
        yield engine


def weights_hash(engine: Engine) -> str:
    """Of every parameter and buffer, a quantised one's scales included."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(engine._runner._model.state_dict(keep_vars=True).items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name, buffer in sorted(engine._runner._model.named_buffers()):
        hasher.update(f"{name} {tuple(buffer.shape)} ".encode())
        hasher.update(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def base_answers(engine: Engine) -> list[list[int]]:
    return [answer.token_ids for answer in run(engine, [make_request(prompt, max_tokens=6) for prompt in PROMPTS])]


def store_all(engine: Engine, uploads: dict[str, Upload], store_path: Path) -> list[str]:
    with AdapterStore(store_path) as store:
        digests = []
        for number, upload in enumerate(uploads.values()):
            with store.upload_folder() as folder:
                weights = folder / "adapter_model.safetensors"
                weights.write_bytes(upload.weights)
                checkpoint = read_checkpoint(upload.config, weights, engine.model.layout)
                digests.append(store.put(f"odd{number}", checkpoint, upload.config, weights).digest)
    return list(dict.fromkeys(digests))


def test_the_base_is_what_it_was(engine: Engine, tmp_path: Path) -> None:
    before, answers = weights_hash(engine), base_answers(engine)
    for name, case in hostile_uploads().items():
        if name.partition(":")[0] in AIMED_AT_TENSORS:
            upload = case.make()
            (tmp_path / "weights").write_bytes(upload.weights)
            with pytest.raises(InvalidAdapter):
                read_checkpoint(upload.config, tmp_path / "weights", engine.model.layout)
    digests = store_all(engine, odd_uploads(), tmp_path / "store")
    damaged = tmp_path / "store" / "content" / digests[0].removeprefix("sha256:") / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    mixed = [
        make_request(PROMPTS[number % 4], adapter if number % 2 else None, max_tokens=6)
        for adapter in digests
        for number in range(4)
    ]
    outcomes = run(engine, mixed)
    for answer in outcomes:
        digest = next((part.digest for part in answer.request.adapters), None)
        if digest is None:
            assert answer.token_ids == answers[PROMPTS.index(answer.request.prompt_token_ids)]
        elif digest == digests[0]:
            assert answer.error_code == "adapter_damaged"
        else:
            assert answer.finish_reason == "length" or answer.error_code == "adapter_load_failed"
    assert sum(answer.finish_reason == "length" for answer in outcomes) > len(outcomes) * 0.8
    assert engine.stats().num_adapter_evictions > 0
    assert base_answers(engine) == answers
    assert weights_hash(engine) == before
