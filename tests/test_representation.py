"""ReFT: rows at the layers' outputs compute pyreft's formulas, at the prompt's first and last tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base_samples import full_layout_of
from block_hooks import added, applied
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from heddle_adapters.methods.representation import INTERVENTIONS, P_BIAS
from heddle_adapters.positions import Positions
from peft_samples import ModelWeights, tiny_gpt2, tiny_llama, tiny_qwen2
from reft_samples import CONFIG, FUNCTIONS, WEIGHTS, edited, reft_config, reft_tensors, save_reft

MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}
LLAMA = tiny_llama()
BASE = full_layout_of(LLAMA)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WITH_ACTIVATION = [name for name, terms in INTERVENTIONS.items() if terms.has_source]


def read(folder: Path, base: BaseLayout = BASE) -> Checkpoint:
    return read_checkpoint(folder / CONFIG, folder / WEIGHTS, base)


def of_layer(tensors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): value.float() for name, value in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_computes_with_the_intervention(model_type: str, intervention: str, tmp_path: Path) -> None:
    model = MODELS[model_type]()
    base = full_layout_of(model)
    tensors = reft_tensors(intervention)
    checkpoint = read(save_reft(tmp_path, reft_config(intervention), tensors), base)
    assert checkpoint.positions == Positions(num_first=2, num_last=3)
    assert (checkpoint.method, checkpoint.combination) == (INTERVENTIONS[intervention].label, "alone")
    token_ids = torch.randint(0, 128, (1, 11), generator=torch.Generator().manual_seed(1))
    changed = [0, 1, 8, 9, 10]
    handles = list[Any]()

    def intervene(layer: int) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, changed] = edited(intervention, of_layer(tensors, layer), hidden[:, changed])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    with torch.no_grad():
        plain = model(token_ids).logits
        with applied(model, checkpoint.compile(ModelWeights(model)), changed):
            served = model(token_ids).logits
        for number, layer in enumerate(base.layers):
            handles.append(model.get_submodule(layer.output).register_forward_hook(intervene(number)))
        expected = model(token_ids).logits
    limit = 1e-5 * max(1.0, float(expected.abs().max()))
    assert float((served - expected).abs().max()) <= limit
    assert float((plain - expected).abs().max()) >= 100 * limit


@given(
    intervention=st.sampled_from(sorted(INTERVENTIONS)),
    activation=st.sampled_from(sorted(FUNCTIONS)),
    rank=st.integers(1, 70),
    layers=st.sets(st.integers(0, 1), min_size=1),
    dtype=st.sampled_from(sorted(DTYPES)),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_the_formula(
    tmp_path: Path,
    intervention: str,
    activation: str,
    rank: int,
    layers: set[int],
    dtype: str,
    has_bias: bool,
    seed: int,
) -> None:
    if intervention not in WITH_ACTIVATION:
        activation = "linear"
    rank = min(rank, 64)
    stored = {
        name: value.to(DTYPES[dtype])
        for name, value in reft_tensors(intervention, sorted(layers), rank, seed).items()
        if has_bias or not name.endswith(P_BIAS)
    }
    config = reft_config(intervention, activation=activation, layers=sorted(layers))
    checkpoint = read(save_reft(tmp_path, config, stored))
    adapter = checkpoint.compile(ModelWeights(LLAMA))
    assert checkpoint.num_rows == sum(update.num_rows for update in adapter.updates)
    assert checkpoint.num_vector_values == sum(64 for update in adapter.updates if update.bias is not None)
    h = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    for layer, update in zip(sorted(layers), adapter.updates, strict=True):
        assert update.site == BASE.layers[layer].output
        expected = (edited(intervention, of_layer(stored, layer), h, activation) - h).numpy()
        limit = 1e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(added(update, h.numpy()), expected, atol=limit, rtol=0)
        assert np.abs(expected).max() >= 100 * limit


def test_identity_is_what_changes_the_computation(tmp_path: Path) -> None:
    def digest(**changes: Any) -> str:
        return read(save_reft(tmp_path, reft_config(**changes), reft_tensors())).digest

    others = {digest(activation="silu"), digest(first=1), digest(last=1), digest(first=3, last=2)}
    assert len(others | {digest()}) == 5
    assert digest(base_model_name_or_path="elsewhere", layers=[1, 0]) == digest()


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def config(**changes: Any) -> Change:
    return lambda fields, _: fields.update(changes)


def tensor(name: str, *shape: int) -> Change:
    return lambda _, tensors: tensors.update({name: torch.ones(shape)})


def without(name: str) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


REFUSED: dict[str, tuple[Change, str, str]] = {
    "intervention": (config(intervention="otherreft"), CONFIG, "intervention is 'otherreft'; it must be one of"),
    "no intervention": (config(intervention=None), CONFIG, "intervention is ''"),
    "activation": (config(activation="gelu"), CONFIG, "activation is 'gelu', and served are"),
    "activation on nothing": (config(intervention="consreft", activation="relu"), CONFIG, "activation is set"),
    "no positions": (config(first=0, last=0), CONFIG, "first and last are both 0"),
    "positions negative": (config(first=-1), CONFIG, "first must be a number of tokens from 0"),
    "positions a text": (config(last="3"), CONFIG, "last must be a number of tokens"),
    "positions huge": (config(last=10**9), CONFIG, "last must be a number of tokens from 0 to 1048576"),
    "layers a text": (config(layers="all"), CONFIG, "layers must be a list"),
    "no layers": (config(layers=[]), CONFIG, "layers must be a list of 1"),
    "layers negative": (config(layers=[0, -1]), CONFIG, "layers must hold whole numbers"),
    "layers twice": (config(layers=[0, 1, 1]), CONFIG, "each once"),
    "layers fractional": (config(layers=[0, 1.5]), CONFIG, "layers must hold whole numbers"),
    "a layer promised": (config(layers=[0, 1, 2]), WEIGHTS, "lists 0; 1; 2"),
    "a layer unlisted": (config(layers=[0]), WEIGHTS, "has tensors of the layers 0; 1"),
    "unknown field": (config(low_rank_dimension=4), CONFIG, "'low_rank_dimension' is set"),
    "projection missing": (without("layers.0.projection.weight"), WEIGHTS, "has no projection.weight for layer 0"),
    "source missing": (without("layers.1.source.weight"), WEIGHTS, "has no source.weight for layer 1"),
    "bias missing": (without("layers.1.source.bias"), WEIGHTS, "has no source.bias for layer 1"),
    "bias unexpected": (tensor("layers.1.projection.bias", 4), WEIGHTS, "not part of a LoReFT adapter"),
    "another intervention's": (config(intervention="lobireft"), WEIGHTS, "not part of a LobiReFT adapter"),
    "unknown tensor": (tensor("layers.01.source.bias", 4), WEIGHTS, "'layers.01.source.bias'"),
    "base weight": (tensor("model.layers.0.mlp.up_proj.weight", 2, 2), WEIGHTS, "not part of a LoReFT adapter"),
}
INCOMPATIBLE: dict[str, tuple[Change, str, str]] = {
    "too wide": (tensor("layers.0.projection.weight", 4, 65), WEIGHTS, "must be [4, 64] and is [4, 65]"),
    "ranks apart": (tensor("layers.0.source.weight", 3, 64), WEIGHTS, "must be [4, 64] and is [3, 64]"),
    "bias too long": (tensor("layers.0.source.bias", 5), WEIGHTS, "must be [4] and is [5]"),
    "scalar": (tensor("layers.0.projection.weight"), WEIGHTS, "must be [0, 64] and is []"),
}


@pytest.mark.parametrize("case", [*REFUSED, *INCOMPATIBLE])
def test_refuses(case: str, tmp_path: Path) -> None:
    change, param, message = (REFUSED | INCOMPATIBLE)[case]
    fields, tensors = reft_config(), reft_tensors()
    change(fields, tensors)
    with pytest.raises(InvalidAdapter) as caught:
        read(save_reft(tmp_path, fields, tensors))
    assert message in caught.value.message
    assert caught.value.param == param
    assert isinstance(caught.value, AdapterIncompatible) == (case in INCOMPATIBLE)


def test_a_layer_too_many_is_of_another_base(tmp_path: Path) -> None:
    folder = save_reft(tmp_path, reft_config(layers=[0, 5]), reft_tensors(layers=[0, 5]))
    with pytest.raises(AdapterIncompatible, match="layer 5 hands on, and tiny llama has 2 layers"):
        read(folder)


@pytest.mark.parametrize("length", range(9))
@pytest.mark.parametrize(("first", "last"), [(3, 0), (0, 3), (2, 3), (1, 1), (9, 9)])
def test_positions_are_those_that_pyreft_edits(length: int, first: int, last: int) -> None:
    """Its `dataset.py:get_intervention_locations`: at most half of the prompt from either end, even if the other is
    not asked for."""
    expected = {*range(min(length // 2, first)), *range(length - min(length // 2, last), length)}
    ranges = Positions(num_first=first, num_last=last).ranges(list(range(length)))
    assert {number for begin, end in ranges for number in range(begin, end)} == expected
