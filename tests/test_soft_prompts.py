"""Prompt tuning and its kin: the rows are those that PEFT puts before a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from peft import CPTConfig, MultitaskPromptTuningConfig, PromptEncoderConfig, PromptTuningConfig

from base_samples import full_layout_of
from heddle_adapters.canonical import Floats
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from peft_samples import ModelWeights
from peft_saves import MODELS, STORAGES, check_outputs, edit_config, edit_tensors, read, saved
from tiny_models import make_tiny_model
from tolerances import LOGITS_FP32

PROMPT = torch.tensor([[5, 9, 77, 3]])
LABELS = {
    "prompt": "prompt tuning",
    "encoder_mlp": "P-tuning",
    "encoder_lstm": "P-tuning",
    "cpt": "context-aware prompt tuning",
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def config_of(kind: str, num_tokens: int) -> Any:
    if kind == "prompt":
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_tokens)
    if kind.startswith("encoder"):
        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=num_tokens,
            encoder_hidden_size=24,
            encoder_reparameterization_type=kind.removeprefix("encoder_").upper(),
        )
    token_ids = [(7 * number) % 128 for number in range(num_tokens)]
    return CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=token_ids,
        cpt_tokens_type_mask=[1 + number % 4 for number in range(num_tokens)],
        opt_projection_epsilon=3.0,
    )


def multitask(num_tokens: int, num_tasks: int, num_ranks: int) -> MultitaskPromptTuningConfig:
    return MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num_tokens, num_tasks=num_tasks, num_ranks=num_ranks
    )


def rows_of(folder: Path, model: Any) -> Floats:
    checkpoint = read(folder, model)
    tokens = checkpoint.compile(ModelWeights(model)).tokens
    assert tokens is not None
    assert checkpoint.num_virtual_tokens == len(tokens.values)
    assert checkpoint.num_row_values == tokens.values.size
    assert tokens.token_ids.tolist() == list(range(128, 128 + len(tokens.values)))
    assert not tokens.reach_head
    return tokens.values


def check_rows(model: Any, peft_model: Any, rows: Floats, task: int | None = None) -> None:
    """As PEFT's own prompt, and as what the model computes behind it."""
    task_ids = None if task is None else torch.tensor([task])
    with torch.no_grad():
        expected = peft_model.get_prompt(batch_size=1, task_ids=task_ids)[0].numpy()
        np.testing.assert_allclose(rows, expected, rtol=0, atol=LOGITS_FP32 * max(1.0, np.abs(expected).max()))
        embedded = torch.cat((torch.from_numpy(rows)[None], model.get_input_embeddings()(PROMPT)), dim=1)
        ours = model(inputs_embeds=embedded).logits[:, len(rows) :]
        theirs = peft_model(input_ids=PROMPT, **({} if task is None else {"task_ids": task_ids})).logits[:, len(rows) :]
        check_outputs(ours.numpy(), theirs, model(PROMPT).logits)


@pytest.mark.parametrize("kind", LABELS)
def test_peft_saves_are_what_peft_puts_before_a_prompt(model: Any, kind: str, tmp_path: Path) -> None:
    peft_model = saved(model, config_of(kind, 6), tmp_path, std=0.4)
    checkpoint = read(tmp_path, model)
    assert (checkpoint.method, checkpoint.combination) == (LABELS[kind], "alone")
    assert checkpoint.sites == (full_layout_of(model).embedding,)
    check_rows(model, peft_model, rows_of(tmp_path, model))


def test_rows_before_an_embedding_that_multiplies_are_not_multiplied(tmp_path: Path) -> None:
    gemma = make_tiny_model("gemma3_text", vocab_size=128)
    check_rows(gemma, saved(gemma, config_of("prompt", 6), tmp_path, std=3), rows_of(tmp_path, gemma))


@pytest.mark.parametrize("task", [0, 1, 2])
def test_each_task_of_a_multitask_prompt(model: Any, tmp_path: Path, task: int) -> None:
    peft_model = saved(model, multitask(5, 3, 2), tmp_path, std=0.8)
    edit_config(tmp_path, heddle_task=task)
    assert read(tmp_path, model).method == "multitask prompt tuning"
    check_rows(model, peft_model, rows_of(tmp_path, model), task)


def test_the_only_task_needs_no_name_and_tasks_are_different_versions(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    peft_model = saved(model, multitask(5, 1, 2), tmp_path, std=0.8)
    check_rows(model, peft_model, rows_of(tmp_path, model), 0)
    saved(model, multitask(5, 2, 2), tmp_path, std=0.8)
    digests = set()
    for task in (0, 1):
        edit_config(tmp_path, heddle_task=task)
        digests.add(read(tmp_path, model).digest)
    assert len(digests) == 2


def rounded_to(dtype: torch.dtype) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([*LABELS, "multitask"]),
    num_tokens=st.integers(1, 40),
    storage=st.sampled_from(sorted(STORAGES)),
    seed=st.integers(0, 99),
)
def test_any_length_and_storage(
    model: Any, tmp_path: Path, kind: str, num_tokens: int, storage: str, seed: int
) -> None:
    config = multitask(num_tokens, 1, 1 + num_tokens % 3) if kind == "multitask" else config_of(kind, num_tokens)
    peft_model = saved(model, config, tmp_path, seed=seed, std=0.8)
    task = torch.tensor([0]) if kind == "multitask" else None
    with torch.no_grad():
        expected = peft_model.get_prompt(batch_size=1, task_ids=task)[0].numpy()
    for dtype, relative in ((torch.float32, LOGITS_FP32), (STORAGES[storage], 0.03)):
        edit_tensors(tmp_path, rounded_to(dtype))
        limit = relative * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(rows_of(tmp_path, model), expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_virtual_tokens": 5}, r"says \[5, any\]"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be a whole number"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a whole number"),
        ({"num_virtual_tokens": 6.0}, "num_virtual_tokens must be a whole number"),
        ({"num_virtual_tokens": 10**8}, "at most 1024"),
        ({"num_transformer_submodules": 2}, "encoder-decoder"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"heddle_task": 1}, "'heddle_task'"),
        ({"soft_prompt_scale": 2}, "'soft_prompt_scale'"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    model = MODELS["llama"]()
    saved(model, config_of("prompt", 6), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InvalidAdapter, match=word):
        read(tmp_path, model)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "heddle_task must be the number of the task .* 0 to 1"),
        ({"heddle_task": 2}, "0 to 1"),
        ({"heddle_task": -1}, "0 to 1"),
        ({"heddle_task": True}, "0 to 1"),
        ({"heddle_task": 0, "num_tasks": 3}, "prefix_task_cols has shape"),
        ({"heddle_task": 0, "num_tasks": 10**9}, "prefix_task_cols has shape"),
        ({"heddle_task": 0, "num_ranks": 4}, "prefix_task_cols has shape"),
        ({"heddle_task": 0, "num_ranks": "2"}, "num_ranks must be"),
    ],
)
def test_tasks_that_are_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    model = MODELS["llama"]()
    saved(model, multitask(5, 2, 2), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InvalidAdapter, match=word):
        read(tmp_path, model)


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    saved(model, config_of("prompt", 6), tmp_path)

    def refused(word: str, tensors: dict[str, Any], kind: type[InvalidAdapter] = InvalidAdapter) -> None:
        edit_tensors(tmp_path, lambda _: tensors)
        with pytest.raises(kind, match=word):
            read(tmp_path, model)

    refused("prompt_embeddings is missing", {"embedding.weight": torch.ones(6, 64)})
    refused("it must have 2 dimensions", {"prompt_embeddings": torch.ones(6, 64, 1)})
    refused("must be", {"prompt_embeddings": torch.ones(6, 65)}, AdapterIncompatible)
    refused("not part of", {"prompt_embeddings": torch.ones(6, 64), "prefix_task_cols": torch.ones(1, 6, 1)})
    refused("NaN", {"prompt_embeddings": torch.full((6, 64), torch.nan)})
    edit_tensors(tmp_path, lambda _: {"prompt_embeddings": torch.ones(6, 64)})
    with pytest.raises(AdapterIncompatible, match="no token embedding"):
        read(tmp_path, model, replace(full_layout_of(model), embedding=None))
