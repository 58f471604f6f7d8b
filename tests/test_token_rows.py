"""Trainable tokens: the rows are what PEFT's embedding, and a head tied to it, compute with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from peft import TrainableTokensConfig
from transformers import LlamaConfig, LlamaForCausalLM

from base_samples import full_layout_of
from heddle_adapters.canonical import TokenRows
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from peft_samples import SIZES, ModelWeights
from peft_saves import MODELS, STORAGES, check_outputs, edit_config, edit_tensors, read, saved
from tiny_models import make_tiny_model


def tied_llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


TOKEN_MODELS = {**MODELS, "tied_llama": tied_llama}


@pytest.fixture(scope="module", params=TOKEN_MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return TOKEN_MODELS[request.param]()


def config_of(token_ids: list[int]) -> TrainableTokensConfig:
    return TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=token_ids)


def compiled(folder: Path, model: Any) -> TokenRows:
    adapter = read(folder, model).compile(ModelWeights(model))
    assert not adapter.updates
    assert adapter.tokens is not None
    return adapter.tokens


def with_rows(weight: torch.Tensor, tokens: TokenRows) -> torch.Tensor:
    """The embedding's weight with the adapter's rows in it."""
    changed = weight.detach().clone()
    changed[torch.from_numpy(tokens.token_ids)] = torch.from_numpy(tokens.values)
    return changed


def check_rows(model: Any, peft_model: Any, tokens: TokenRows) -> None:
    inner = peft_model.base_model.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids = torch.arange(model.config.vocab_size)
    with torch.no_grad():
        changed = with_rows(embedding.weight, tokens)
        check_outputs(changed[ids].numpy(), inner.get_input_embeddings()(ids), embedding(ids))
        assert tokens.reach_head == (head.weight is embedding.weight)
        x = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
        expected = inner.get_output_embeddings()(x)
        if tokens.reach_head:
            check_outputs((x @ changed.T).numpy(), expected, head(x))
        else:
            torch.testing.assert_close(head(x), expected, rtol=0, atol=0)


def test_peft_saves_fold_to_what_peft_computes(model: Any, tmp_path: Path) -> None:
    peft_model = saved(model, config_of([77, 3, 127, 0]), tmp_path)
    checkpoint = read(tmp_path, model)
    assert (checkpoint.method, checkpoint.combination, checkpoint.num_virtual_tokens) == (
        "trainable tokens",
        "alone",
        0,
    )
    tokens = compiled(tmp_path, model)
    assert tokens.token_ids.tolist() == [0, 3, 77, 127]
    assert checkpoint.num_row_values == tokens.values.size
    check_rows(model, peft_model, tokens)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    token_ids=st.lists(st.integers(0, 127), min_size=1, max_size=20, unique=True),
    storage=st.sampled_from(sorted(STORAGES)),
    seed=st.integers(0, 99),
)
def test_any_tokens_in_any_order_and_storage(
    model: Any, tmp_path: Path, token_ids: list[int], storage: str, seed: int
) -> None:
    peft_model = saved(model, config_of(token_ids), tmp_path, seed=seed, storage=STORAGES[storage])
    tokens = compiled(tmp_path, model)
    assert tokens.token_ids.tolist() == sorted(token_ids)
    check_rows(model, peft_model, tokens)


def test_a_tied_head_is_reached_without_a_copy_in_the_file(tmp_path: Path) -> None:
    """PEFT ties the rows when it loads, whatever the file holds for the head."""
    model = tied_llama()
    peft_model = saved(model, config_of([4, 9]), tmp_path)
    edit_tensors(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if "lm_head" not in name})
    check_rows(model, peft_model, compiled(tmp_path, model))


def test_rows_of_an_embedding_that_multiplies_are_weights(tmp_path: Path) -> None:
    """Gemma's embedding multiplies what it looks up, and so it does with trained rows: they are saved unmultiplied."""
    gemma = make_tiny_model("gemma3_text")
    peft_model = saved(gemma, config_of([4, 9]), tmp_path)
    tokens = compiled(tmp_path, gemma)
    embedding = gemma.get_input_embeddings()
    with torch.no_grad():
        ours = with_rows(embedding.weight, tokens)[:12] * embedding.embed_scale
        ids = torch.arange(12)
        check_outputs(ours.numpy(), peft_model.base_model.model.get_input_embeddings()(ids), embedding(ids))


@pytest.mark.parametrize("name", ["llama", "qwen2", "tied_llama"])
@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "embed_tokens"]])
def test_rows_of_the_head(name: str, targets: list[str], tmp_path: Path) -> None:
    """A head of its own, or a tied one whose embedding is not trained, has rows of its own."""
    model = TOKEN_MODELS[name]()
    if name == "tied_llama" and len(targets) == 2:
        pytest.skip("PEFT saves these rows three times, inside of one another")
    peft_model = saved(
        model, TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[9, 4], target_modules=targets), tmp_path
    )
    checkpoint = read(tmp_path, model)
    adapter = checkpoint.compile(ModelWeights(model))
    (update,) = adapter.updates
    assert update.rows is not None
    assert (update.site, checkpoint.num_rows, update.num_rows) == ("lm_head", 2, 2)
    head, x = model.lm_head, torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = head(x).numpy() + (x.numpy() @ update.rows.a.T) @ update.rows.b
        check_outputs(ours, peft_model.base_model.model.lm_head(x), head(x))
    assert (adapter.tokens is not None) == (len(targets) == 2)
    if adapter.tokens is not None:
        assert not adapter.tokens.reach_head
        ids = torch.arange(128)
        embedding = model.get_input_embeddings()
        changed = with_rows(embedding.weight, adapter.tokens).numpy()
        check_outputs(changed, peft_model.base_model.model.get_input_embeddings()(ids), embedding(ids))


def test_order_of_the_ids_is_part_of_the_identity(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    saved(model, config_of([4, 9]), tmp_path)
    first = read(tmp_path, model).digest
    edit_config(tmp_path, token_indices=[9, 4])
    assert read(tmp_path, model).digest != first
    edit_config(tmp_path, token_indices=[4, 9], init_weights=False)
    assert read(tmp_path, model).digest == first


@pytest.mark.parametrize(
    ("token_ids", "word"),
    [
        (None, "must be a list"),
        ([], "must be a list"),
        ({"embed_tokens": [1]}, "must be a list"),
        ([4, 9.0], "must hold token ids"),
        ([4, True], "must hold token ids"),
        ([4, 4], "twice"),
        ([4], "token_indices of .* names 1 tokens"),
        ([4, 9, 10], "token_indices of .* names 3 tokens"),
        ([4, 128], "token_indices names token 128, and this base's tokens end at 127"),
        ([-1, 4], "must hold token ids"),
        ([4, 10**18], "token_indices names token 10+,"),
    ],
)
def test_token_ids_that_are_refused(tmp_path: Path, token_ids: Any, word: str) -> None:
    model = MODELS["llama"]()
    saved(model, config_of([4, 9]), tmp_path)
    edit_config(tmp_path, token_indices=token_ids)
    with pytest.raises(InvalidAdapter, match=word):
        read(tmp_path, model)


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    saved(model, config_of([4, 9]), tmp_path)
    embedding = "base_model.model.model.embed_tokens"
    rows = f"{embedding}.trainable_tokens_delta"

    def refused(word: str, edit: Any, kind: type[InvalidAdapter] = InvalidAdapter) -> None:
        edit_tensors(tmp_path, edit)
        with pytest.raises(kind, match=word):
            read(tmp_path, model)

    refused(
        "only rows of the token embedding",
        lambda tensors: tensors | {"base_model.model.model.layers.0.mlp.up_proj.trainable_tokens_delta": tensors[rows]},
    )
    refused(
        "does not have",
        lambda tensors: {"base_model.model.norm.trainable_tokens_delta": torch.ones(2, 64)},
        AdapterIncompatible,
    )
    refused("must be", lambda tensors: {rows: torch.ones(2, 65)}, AdapterIncompatible)
    refused("wrong type", lambda tensors: {rows: torch.ones(2, 64, dtype=torch.int64)})
    refused(
        "base's own tensors",
        lambda tensors: {rows: torch.ones(2, 64), f"{embedding}.base_layer.weight": torch.ones(128, 64)},
    )


def test_a_tied_head_with_rows_of_its_own_is_refused_when_compiled(tmp_path: Path) -> None:
    model = tied_llama()
    saved(model, config_of([4, 9]), tmp_path)
    edit_tensors(tmp_path, lambda tensors: {name: t + ("lm_head" in name) for name, t in tensors.items()})
    with pytest.raises(InvalidAdapter, match="differs from"):
        read(tmp_path, model).compile(ModelWeights(model))


def test_rows_of_a_base_without_an_embedding_site(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    saved(model, config_of([4, 9]), tmp_path)
    with pytest.raises(InvalidAdapter, match="only rows of the token embedding"):
        read(tmp_path, model, replace(full_layout_of(model), embedding=None))
