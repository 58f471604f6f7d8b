"""Reading adapters: real PEFT saves fold to what PEFT computes; everything else is a typed error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from transformers.pytorch_utils import Conv1D

from adapter_samples import (
    BASE,
    DOWN,
    NoBase,
    Q,
    V,
    config_bytes,
    lora_config,
    lora_tensors,
    tensor_name,
    write_weights,
)
from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import Site
from heddle_adapters.canonical import Floats, Rows, SiteUpdate
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from heddle_adapters.store import AdapterStore
from peft_samples import KINDS, adapted, layout_of, make_adapter, tiny_gpt2, tiny_llama, tiny_qwen2

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}
LABELS = {"rslora": "rsLoRA", "ia3": "IA3", "ia3_feedforward": "IA3"}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def read_folder(folder: Path, model: Any) -> Checkpoint:
    return read_checkpoint(folder / CONFIG, folder / WEIGHTS, layout_of(model))


def apply(update: SiteUpdate, layer: Any, x: Floats) -> Floats:
    """The canonical form's formula, word for word, over one layer of the base."""
    weight = layer.weight.detach().numpy()
    weight = weight.T if isinstance(layer, Conv1D) else weight
    out_scale = np.float32(1) if update.out_scale is None else update.out_scale
    b0 = np.float32(0) if layer.bias is None else layer.bias.detach().numpy()
    y = out_scale * ((x if update.in_scale is None else update.in_scale * x) @ weight.T)
    y = y + (out_scale if update.scales_base_bias else 1) * b0 + (0 if update.bias is None else update.bias)
    if update.rows is not None:
        y = y + (update.rows.gain * (x @ update.rows.a.T + update.rows.c)) @ update.rows.b
    return np.asarray(y, np.float32)


def rows_of(update: SiteUpdate) -> Rows:
    assert update.rows is not None
    return update.rows


@pytest.mark.parametrize(
    ("rule", "is_whole"),
    [
        ({"layers_to_transform": [0]}, True),
        ({"layers_to_transform": 0}, True),
        ({"layers_to_transform": [0, 1]}, False),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, True),
        ({"exclude_modules": ["nothing"]}, False),
    ],
)
def test_half_an_adapter_is_refused_whatever_picks_its_modules(
    rule: dict[str, Any], is_whole: bool, tmp_path: Path
) -> None:
    model = tiny_llama()
    adapted(model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[0])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "layers_to_transform": None, **rule}))
    if is_whole:
        assert read_folder(tmp_path, tiny_llama()).sites == ("model.layers.0.self_attn.q_proj",)
    else:
        with pytest.raises(InvalidAdapter, match=r"promises: model\.layers\.1\.self_attn\.q_proj"):
            read_folder(tmp_path, tiny_llama())


@pytest.mark.parametrize("kind", KINDS)
def test_peft_saves_fold_to_what_peft_computes(model: Any, kind: str, tmp_path: Path) -> None:
    peft_model = make_adapter(model, kind, tmp_path)
    checkpoint = read_folder(tmp_path, model)
    assert checkpoint.method == LABELS.get(kind, "LoRA")
    assert checkpoint.sites == tuple(site.path for site in layout_of(model).sites)
    generator = np.random.default_rng(0)
    for update in checkpoint.compile(NoBase()).updates:
        layer = peft_model.base_model.model.get_submodule(update.site)
        in_features = layout_of(model).site(update.site).in_features
        x = generator.standard_normal((5, in_features)).astype(np.float32)
        with torch.no_grad():
            expected = layer(torch.from_numpy(x)).numpy()
            base = layer.base_layer(torch.from_numpy(x)).numpy()
        limit = 1e-5 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(apply(update, layer.base_layer, x), expected, atol=limit, rtol=0)
        assert np.abs(expected - base).max() > 100 * limit


@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns", "lora_bias"])
def test_rows_sum_to_the_dense_delta(model: Any, kind: str, tmp_path: Path) -> None:
    peft_model = make_adapter(model, kind, tmp_path)
    for update in read_folder(tmp_path, model).compile(NoBase()).updates:
        layer = peft_model.base_model.model.get_submodule(update.site)
        delta = layer.get_delta_weight("default").detach().numpy()
        delta = delta.T if isinstance(layer.base_layer, Conv1D) else delta
        rows = rows_of(update)
        summed = sum(gain * np.outer(b, a) for gain, a, b in zip(rows.gain, rows.a, rows.b, strict=True))
        np.testing.assert_allclose(summed, delta, atol=1e-5, rtol=0)
        assert np.abs(delta).max() > 100 * 1e-5


def test_patterns_give_each_module_its_rank_and_scale(tmp_path: Path) -> None:
    llama = tiny_llama()
    peft_model = make_adapter(llama, "patterns", tmp_path)
    checkpoint = read_folder(tmp_path, llama)
    updates = {update.site: update for update in checkpoint.compile(NoBase()).updates}
    assert len({update.num_rows for update in updates.values()}) > 2
    assert len({float(rows_of(update).gain[0]) for update in updates.values()}) > 3
    for site, update in updates.items():
        layer = peft_model.base_model.model.get_submodule(site)
        assert update.num_rows == layer.r["default"]
        assert rows_of(update).gain[0] == pytest.approx(layer.scaling["default"], rel=1e-6)
    assert checkpoint.max_rank == max(update.num_rows for update in updates.values())
    assert checkpoint.num_rows == sum(update.num_rows for update in updates.values())


def test_literal_patterns_match_as_peft_matches_expressions() -> None:
    modules = ["q_proj", Q, V, DOWN, "model.layers.10.self_attn.q_proj", "model.layers.0.self_attn.xq_proj"]
    keys = ["q_proj", "proj", "self_attn.q_proj", "q_proj$", f"^{Q}", f"^{Q}$", "^q_proj", "0.self_attn.q_proj", Q]
    keys += [r"self_attn\.v_proj", "v_proj", "layers.0.mlp.down_proj", "nothing"]
    source = random.Random(0)
    for _ in range(300):
        chosen = source.sample(keys, k=source.randrange(1, len(keys)))
        fields: dict[str, Any] = {"alpha_pattern": {key: float(number) for number, key in enumerate(chosen, start=1)}}
        pattern = AdapterConfig(fields).number_pattern("alpha_pattern")
        for module in modules:
            expected = fields["alpha_pattern"].get(get_pattern_key(chosen, module), 0.0)
            assert pattern.value_for(module, 0.0) == expected, (chosen, module)


def test_memory_estimate_is_the_size_of_what_is_compiled(tmp_path: Path) -> None:
    llama = tiny_llama()
    for kind in KINDS:
        make_adapter(llama, kind, tmp_path / kind)
        checkpoint = read_folder(tmp_path / kind, llama)
        updates = checkpoint.compile(NoBase()).updates
        rows = sum(update.rows.a.nbytes + update.rows.b.nbytes for update in updates if update.rows is not None)
        vectors = [vector for update in updates for vector in (update.in_scale, update.out_scale, update.bias)]
        vector_bytes = sum(vector.nbytes for vector in vectors if vector is not None)
        assert checkpoint.estimate_bytes(4) == rows + vector_bytes
        assert checkpoint.estimate_bytes(2) == rows // 2 + vector_bytes
        assert checkpoint.size_bytes == (tmp_path / kind / WEIGHTS).stat().st_size


def test_half_precision_saves_are_widened_exactly(tmp_path: Path) -> None:
    llama = tiny_llama()
    peft_model = make_adapter(llama, "lora", tmp_path)
    peft_model.to(torch.bfloat16).save_pretrained(tmp_path)
    for update in read_folder(tmp_path, llama).compile(NoBase()).updates:
        layer = peft_model.base_model.model.get_submodule(update.site)
        np.testing.assert_array_equal(rows_of(update).a, layer.lora_A["default"].weight.detach().float().numpy())
        np.testing.assert_array_equal(rows_of(update).b.T, layer.lora_B["default"].weight.detach().float().numpy())


def test_some_targets_and_keys_without_the_prefix(tmp_path: Path) -> None:
    tensors = {name.removeprefix("base_model.model."): value for name, value in lora_tensors().items()}
    weights = write_weights(tmp_path / WEIGHTS, tensors)
    checkpoint = read_checkpoint(config_bytes(lora_config()), weights, BASE)
    assert checkpoint.sites == (Q, V)
    assert checkpoint.num_rows == 4


# Identity


def digest_of(tmp_path: Path, config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> str:
    weights = write_weights(tmp_path / WEIGHTS, tensors or lora_tensors())
    return read_checkpoint(config_bytes(config or lora_config()), weights, BASE).digest


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 4.0},
        {"lora_dropout": 0.3},
        {"base_model_name_or_path": "elsewhere"},
        {"peft_version": "9.9"},
        {"inference_mode": True},
        {"target_modules": r"(a|a)*$"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
        {"use_dora": False, "modules_to_save": None, "eva_config": {"rho": 2}},
        {"future_option": None, "another": []},
    ],
)
def test_digest_ignores_what_does_not_matter(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert digest_of(tmp_path, lora_config(**changes)) == digest_of(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 5},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 9}},
        {"heddle_base_fingerprint": BASE.fingerprint},
    ],
)
def test_digest_tells_scalars_apart(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert digest_of(tmp_path, lora_config(**changes)) != digest_of(tmp_path)


def test_digest_tells_tensors_apart(tmp_path: Path) -> None:
    one_ulp = lora_tensors()
    name = tensor_name(Q, "lora_A.weight")
    one_ulp[name][0, 0] = np.nextafter(one_ulp[name][0, 0], np.float32(9))
    halves = {name: value.astype(np.float16) for name, value in lora_tensors().items()}
    digests = {digest_of(tmp_path, tensors=tensors) for tensors in (lora_tensors(), one_ulp, halves, lora_tensors(1))}
    assert len(digests) == 4
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)


def test_digests_stay_what_they_are_across_releases(tmp_path: Path) -> None:
    """Stored content is found and verified by digest: another value here makes every stored adapter unreadable."""
    tensors = {
        name: np.arange(value.size, dtype=np.float32).reshape(value.shape) for name, value in lora_tensors().items()
    }
    assert (
        digest_of(tmp_path, tensors=tensors)
        == "sha256:420fda40047109682398348f2152be6a1522565a6efd3441a1ced618e6bfe68c"
    )


def test_order_of_patterns_is_part_of_the_identity(tmp_path: Path) -> None:
    forwards = lora_config(alpha_pattern={"q_proj": 1, "self_attn.q_proj": 2})
    backwards = lora_config(alpha_pattern={"self_attn.q_proj": 2, "q_proj": 1})
    assert digest_of(tmp_path, forwards) != digest_of(tmp_path, backwards)


# Refusals: each case changes an honest upload, and nothing may reach the store.

Tensors = dict[str, Any]
Change = Callable[[dict[str, Any], Tensors], None]


def config(**changes: Any) -> Change:
    return lambda fields, _: fields.update(changes)


def tensor(site: str, part: str, value: Floats) -> Change:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        tensors[tensor_name(site, part)] = value

    return change


def raw(key: str) -> Change:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        tensors[key] = np.ones((2, 2), np.float32)

    return change


def without(site: str, *parts: str) -> Change:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        for part in parts:
            del tensors[tensor_name(site, part)]

    return change


def poisoned(value: float) -> Change:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        tensors[tensor_name(V, "lora_B.weight")][3, 1] = value

    return change


def ia3(fields: dict[str, Any], shape_q: tuple[int, int], shape_down: tuple[int, int]) -> Change:
    def change(config: dict[str, Any], tensors: Tensors) -> None:
        config.clear()
        config.update({"peft_type": "IA3", "target_modules": ["q_proj", "down_proj"], **fields})
        tensors.clear()
        tensors[tensor_name(Q, "ia3_l")] = np.ones(shape_q, np.float32)
        tensors[tensor_name(DOWN, "ia3_l")] = np.ones(shape_down, np.float32)

    return change


def ones(*shape: int) -> Floats:
    return np.ones(shape, np.float32)


A, B = "lora_A.weight", "lora_B.weight"


def whole_numbers(_: dict[str, Any], tensors: Tensors) -> None:
    tensors[tensor_name(Q, A)] = np.ones((2, 8), np.int32)


REFUSED: dict[str, tuple[Change, str, str]] = {
    # what the config asks for
    "no peft_type": (config(peft_type=None), CONFIG, "peft_type is missing"),
    "unknown peft_type": (config(peft_type="LoRA"), CONFIG, "this server takes ADALORA"),
    "peft_type a number": (config(peft_type=3), CONFIG, "peft_type must be a string"),
    "DoRA without magnitudes": (config(use_dora=True), WEIGHTS, f"{Q}, but no lora_magnitude_vector"),
    "DoRA not a flag": (config(use_dora="yes"), CONFIG, "use_dora must be true or false"),
    "DoRA and a bias": (config(use_dora=True, lora_bias=True), CONFIG, "lora_bias is true, which DoRA does not go"),
    "bias all": (config(bias="all"), WEIGHTS, f"lacks biases that bias of adapter_config.json promises: {V}"),
    "bias lora_only": (config(bias="lora_only"), WEIGHTS, f"lacks biases that bias of {CONFIG} promises: {V}"),
    "bias of another method": (config(bias="boft_only"), CONFIG, "bias is 'boft_only'; it must be 'none', 'all' or"),
    "modules_to_save": (
        config(modules_to_save=["lm_head"]),
        CONFIG,
        "has nothing for 'lm_head', which modules_to_save",
    ),
    "trainable tokens of text": (config(trainable_token_indices=["x"]), CONFIG, "trainable_token_indices must hold"),
    "layer replication": (config(layer_replication=[[0, 1]] * 1000), CONFIG, "layer_replication is set"),
    "activated LoRA of text": (config(alora_invocation_tokens="go"), CONFIG, "alora_invocation_tokens must be a list"),
    "QA-LoRA": (config(use_qalora=True), CONFIG, "use_qalora is true"),
    "Arrow": (config(arrow_config={"top_k": 3}), CONFIG, "arrow_config is set"),
    "KaSA without diagonals": (config(kasa_config={"beta": 1}), WEIGHTS, f"{Q}, but no lora_diag"),
    "KaSA and DoRA": (config(kasa_config={}, use_dora=True), CONFIG, "use_dora and kasa_config are set together"),
    "BD-LoRA not an object": (config(use_bdlora=True), CONFIG, "use_bdlora must be an object"),
    "BD-LoRA of odd blocks": (
        config(use_bdlora={"nblocks": 3, "target_modules_bd_a": ["q_proj"]}),
        CONFIG,
        "its 3 blocks do not divide rank 2 and width 8",
    ),
    "Megatron": (config(megatron_config={"x": 1}), CONFIG, "megatron_config is set"),
    "target parameters": (config(target_parameters=["experts"]), CONFIG, "target_parameters is set"),
    "PiSSA and DoRA": (
        config(init_lora_weights="pissa", use_dora=True),
        CONFIG,
        "init_lora_weights and use_dora are set together",
    ),
    "PiSSA niter": (config(init_lora_weights="pissa_niter_16"), CONFIG, "path_initial_model_for_weight_conversion"),
    "OLoRA transposed": (config(init_lora_weights="olora", fan_in_fan_out=True), CONFIG, "fan_in_fan_out is true"),
    "CorDA": (config(init_lora_weights="corda"), CONFIG, "init_lora_weights is 'corda'"),
    "LoftQ": (config(init_lora_weights="loftq"), CONFIG, "init_lora_weights is 'loftq'"),
    "LoRA-GA": (config(init_lora_weights="lora_ga"), CONFIG, "init_lora_weights is 'lora_ga'"),
    "unknown initialisation": (config(init_lora_weights=["x"]), CONFIG, "init_lora_weights is"),
    "unknown option": (
        config(shadow_model="hub/model"),
        CONFIG,
        "'shadow_model' is set, and this server does not know",
    ),
    "base fingerprint not text": (
        config(heddle_base_fingerprint=7),
        CONFIG,
        "heddle_base_fingerprint must be a string",
    ),
    # numbers
    "rank zero": (config(r=0), CONFIG, "r must be a whole number of at least 1, not '0'"),
    "negative rank": (config(r=-4), CONFIG, "r must be a whole number"),
    "rank a string": (config(r="2"), CONFIG, "r must be a whole number"),
    "rank true": (config(r=True), CONFIG, "r must be a whole number"),
    "rank 2.0": (config(r=2.0), CONFIG, "r must be a whole number"),
    "rank bomb": (config(r=10**7), WEIGHTS, "has shape [2, 8], but adapter_config.json gives that module rank 1e+07"),
    "rank mismatch": (config(r=8), WEIGHTS, "has shape [2, 8], but adapter_config.json gives that module rank 8"),
    "rank pattern mismatch": (config(rank_pattern={"v_proj": 3}), WEIGHTS, "v_proj has shape [2, 8]"),
    "rank pattern zero": (config(rank_pattern={"v_proj": 0}), CONFIG, "rank_pattern['v_proj'] must be a whole number"),
    "rank pattern a list": (config(rank_pattern=[1]), CONFIG, "rank_pattern must be an object"),
    "rank pattern regex": (config(rank_pattern={"(a+)+$": 2}), CONFIG, "rank_pattern key '(a+)+$' is a regular"),
    "rank pattern wildcard": (config(rank_pattern={".*q_proj": 2}), CONFIG, "write one key per module"),
    "alpha pattern regex": (config(alpha_pattern={r"layers\.\d.q": 2}), CONFIG, "alpha_pattern key"),
    "alpha pattern choice": (config(alpha_pattern={"q_proj|v_proj": 2}), CONFIG, "alpha_pattern key 'q_proj|v_proj'"),
    "alpha pattern huge": (config(alpha_pattern={"v_proj": 1e9}), CONFIG, "alpha_pattern scales"),
    "alpha pattern text": (config(alpha_pattern={"v_proj": "1"}), CONFIG, "alpha_pattern['v_proj'] must be a number"),
    "alpha huge": (config(lora_alpha=20_001), CONFIG, "at most 10000 is allowed"),
    "alpha a string": (config(lora_alpha="16"), CONFIG, "lora_alpha must be a number"),
    "alpha true": (config(lora_alpha=True), CONFIG, "lora_alpha must be a number"),
    "alpha null": (config(lora_alpha=None), CONFIG, "lora_alpha must be a number"),
    "rslora a string": (config(use_rslora="yes"), CONFIG, "use_rslora must be true or false"),
    # tensors
    "another adapter's name": (tensor(Q, "lora_A.victim.weight", ones(2, 8)), WEIGHTS, "q_proj.lora_A.victim.weight'"),
    "base layer": (tensor(Q, "base_layer.weight", ones(8, 8)), WEIGHTS, "base's own tensors cannot be uploaded"),
    "base weight": (tensor(Q, "weight", ones(8, 8)), WEIGHTS, "q_proj.weight'"),
    "head": (raw("base_model.model.lm_head.weight"), WEIGHTS, "lm_head.weight'"),
    "unknown key": (raw("something"), WEIGHTS, "'something'"),
    "suffix without module": (raw("lora_A.weight"), WEIGHTS, "'lora_A.weight'"),
    "path traversal": (raw("../../etc/passwd"), WEIGHTS, "'../../etc/passwd'"),
    "base layer of another module": (tensor(DOWN, "base_layer.weight", ones(8, 16)), WEIGHTS, "base_layer.weight for"),
    "magnitude": (tensor(Q, "lora_magnitude_vector", ones(8)), WEIGHTS, "the config has use_dora false"),
    "diagonal": (tensor(Q, "lora_diag", ones(2)), WEIGHTS, "the config has no kasa_config"),
    "unexpected bias": (tensor(Q, "lora_B.bias", ones(8)), WEIGHTS, "the config has lora_bias false"),
    "bias missing": (config(lora_bias=True), WEIGHTS, "but no lora_B.bias"),
    "B missing": (without(Q, B), WEIGHTS, "q_proj, but no lora_B.weight"),
    "A missing": (without(V, A), WEIGHTS, "v_proj, but no lora_A.weight"),
    "target missing": (without(V, A, B), WEIGHTS, "target_modules of adapter_config.json promises: " + V),
    "key twice": (raw(f"{Q}.{A}"), WEIGHTS, "keep one of them"),
    "NaN": (poisoned(float("nan")), WEIGHTS, "v_proj.lora_B.weight' holds NaN or infinite"),
    "infinity": (poisoned(float("inf")), WEIGHTS, "v_proj.lora_B.weight' holds NaN or infinite"),
    "whole numbers": (
        whole_numbers,
        WEIGHTS,
        f"of the wrong type, whole numbers or floating-point: '{tensor_name(Q, A)}'",
    ),
    "scalar A": (tensor(Q, A, np.array(1, np.float32)), WEIGHTS, "lora_A.weight of " + Q + " has shape []"),
    # IA3
    "IA3 regex": (ia3({"feedforward_modules": ".*down"}, (8, 1), (1, 16)), CONFIG, "feedforward_modules is a regular"),
    "IA3 not strings": (ia3({"feedforward_modules": [1]}, (8, 1), (1, 16)), CONFIG, "must hold strings only"),
    "IA3 input undeclared": (ia3({}, (8, 1), (1, 16)), WEIGHTS, "says that it scales the layer's output"),
    "IA3 output declared input": (
        ia3({"feedforward_modules": ["down_proj"]}, (8, 1), (8, 1)),
        WEIGHTS,
        "says that it scales the layer's input",
    ),
    "IA3 modules_to_save": (
        ia3({"modules_to_save": ["norm"]}, (8, 1), (8, 1)),
        CONFIG,
        "has nothing for 'norm', which modules_to_save",
    ),
    "IA3 with rank": (ia3({"r": 8}, (8, 1), (8, 1)), CONFIG, "'r' is set"),
}

INCOMPATIBLE: dict[str, tuple[Change, str, str]] = {
    "A too wide": (tensor(Q, A, ones(2, 9)), WEIGHTS, f"{tensor_name(Q, A)} must be [2, 8] and is [2, 9]"),
    "B too tall": (tensor(V, B, ones(5, 2)), WEIGHTS, f"{tensor_name(V, B)} must be [4, 2] and is [5, 2]"),
    "B of another rank": (tensor(V, B, ones(4, 3)), WEIGHTS, "must be [4, 2] and is [4, 3]"),
    "B transposed": (tensor(V, B, ones(2, 4)), WEIGHTS, "must be [4, 2] and is [2, 4]"),
    "A of three dimensions": (tensor(Q, A, ones(2, 8, 1)), WEIGHTS, "must be [2, 8] and is [2, 8, 1]"),
    "a layer too many": (raw("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"), WEIGHTS, "layers.7"),
    "embedding": (raw("base_model.model.model.embed_tokens.lora_embedding_A"), WEIGHTS, "'model.embed_tokens'"),
    "trainable tokens": (config(trainable_token_indices=[1, 2]), CONFIG, "does not name this base's token embedding"),
    "activated LoRA": (config(alora_invocation_tokens=[1]), CONFIG, "alora_invocation_tokens holds 1, and the tokens"),
    "BD-LoRA of whole matrices": (
        config(use_bdlora={"nblocks": 2, "target_modules_bd_a": ["q_proj"]}),
        WEIGHTS,
        f"{tensor_name(Q, A)} must be [2, 4] and is [2, 8]",
    ),
    "IA3 width": (ia3({}, (9, 1), (8, 1)), WEIGHTS, "must be [8, 1] and is [9, 1]"),
    "other base": (config(heddle_base_fingerprint="sha256:1"), CONFIG, "heddle_base_fingerprint is 'sha256:1'"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AdapterStore, Path]]:
    path = tmp_path_factory.mktemp("store")
    with AdapterStore(path) as opened:
        with opened.upload_folder() as folder:
            weights = write_weights(folder / WEIGHTS, lora_tensors())
            config = config_bytes(lora_config())
            opened.put("victim", read_checkpoint(config, weights, BASE), config, weights)
        yield opened, path


def upload(store: AdapterStore, name: str, config: bytes, tensors: Tensors) -> None:
    with store.upload_folder() as folder:
        weights = write_weights(folder / WEIGHTS, tensors)
        store.put(name, read_checkpoint(config, weights, BASE), config, weights)


def snapshot(store: AdapterStore, path: Path) -> Any:
    files = {file: file.read_bytes() for folder in ("content", "incoming") for file in (path / folder).rglob("*.*")}
    return store.list(), files


@pytest.mark.parametrize("case", [*REFUSED, *INCOMPATIBLE])
def test_refuses(store: tuple[AdapterStore, Path], case: str) -> None:
    change, param, message = (REFUSED | INCOMPATIBLE)[case]
    fields, tensors = lora_config(), lora_tensors()
    change(fields, tensors)
    before = snapshot(*store)
    with pytest.raises(InvalidAdapter) as caught:
        upload(store[0], "victim", config_bytes(fields), tensors)
    assert message in caught.value.message
    assert caught.value.param == param
    assert param in caught.value.message
    assert isinstance(caught.value, AdapterIncompatible) == (case in INCOMPATIBLE)
    assert snapshot(*store) == before


BAD_JSON = {
    "empty": (b"", "is not JSON"),
    "not an object": (b"[]", "must be a JSON object"),
    "NaN": (b'{"peft_type": "LORA", "lora_alpha": NaN}', "'NaN', which is not finite"),
    "infinity": (b'{"peft_type": "LORA", "lora_alpha": Infinity}', "not finite"),
    "overflow": (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "'1e999', which is not finite"),
    "duplicate": (b'{"peft_type": "LORA", "peft_type": "IA3"}', "the key 'peft_type' more than once"),
    "nested": (b'{"a":' * 40_000, "nested too deeply"),
    "too long": (b'{"a": "' + b"x" * 2**20 + b'"}', "at most 1048576 are allowed"),
    "digits": (b'{"r": ' + b"9" * 5000 + b"}", "integer of 5000 digits"),
    "UTF-16": ('{"peft_type": "LORA"}'.encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_refuses_config_text(store: tuple[AdapterStore, Path], case: str) -> None:
    data, message = BAD_JSON[case]
    before = snapshot(*store)
    with pytest.raises(InvalidAdapter) as caught:
        upload(store[0], "victim", data, lora_tensors())
    assert message in caught.value.message
    assert caught.value.param == CONFIG
    assert snapshot(*store) == before


def test_lists_the_first_mismatches(tmp_path: Path) -> None:
    make_adapter(tiny_llama(), "lora", tmp_path)
    base = layout_of(tiny_llama())
    for more_in, more_out, num_left_out in ((1, 0, 9), (1, 1, 23)):
        sites = (
            replace(site, in_features=site.in_features + more_in, out_features=site.out_features + more_out)
            for site in base.sites
        )
        with pytest.raises(AdapterIncompatible) as caught:
            read_checkpoint(tmp_path / CONFIG, tmp_path / WEIGHTS, replace(base, sites=tuple(sites)))
        assert caught.value.message.count(" must be ") == 5
        assert f"and {num_left_out} more" in caught.value.message


def test_unknown_keys_are_listed_up_to_twenty(tmp_path: Path) -> None:
    tensors = lora_tensors() | {f"extra.{number}": ones(1) for number in range(25)}
    weights = write_weights(tmp_path / WEIGHTS, tensors)
    with pytest.raises(InvalidAdapter, match=r"25 tensors that are not part of a LoRA adapter.*and 5 more"):
        read_checkpoint(config_bytes(lora_config()), weights, BASE)


def test_the_right_fingerprint_is_taken(tmp_path: Path) -> None:
    digest_of(tmp_path, lora_config(heddle_base_fingerprint=BASE.fingerprint))


EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
WHOLE = replace(
    BASE,
    sites=(*BASE.sites, Site(HEAD, "linear", 8, 10, False), Site(EMBEDDING, "embedding", 10, 8, False)),
    embedding=EMBEDDING,
    head=HEAD,
)
OF_EMBEDDING = {tensor_name(EMBEDDING, EMBEDDING_A): ones(2, 10), tensor_name(EMBEDDING, EMBEDDING_B): ones(8, 2)}
OF_HEAD = {tensor_name(HEAD, A): ones(2, 8), tensor_name(HEAD, B): ones(10, 2)}


def halves(*shape: int) -> Floats:
    return np.full(shape, 0.5, np.float32)


class Halves:
    """`source.BaseWeights` of `WHOLE`, in which every number is a half."""

    def weight(self, path: str) -> Floats:
        site = WHOLE.site(path)
        is_embedding = site.kind == "embedding"
        return halves(
            *((site.in_features, site.out_features) if is_embedding else (site.out_features, site.in_features))
        )

    def bias(self, path: str) -> Floats | None:
        return halves(4) if path == V else None


def copied(path: str, value: Floats) -> Tensors:
    return {tensor_name(path, "base_layer.weight"): value}


BASE_COPIES: dict[str, tuple[Tensors, str]] = {
    "of an embedding that is not adapted": (copied(EMBEDDING, ones(10, 8)), f"{EMBEDDING}, but no {EMBEDDING_A}"),
    "of a head that is not adapted": (copied(HEAD, ones(10, 8)), f"for {HEAD}, but no {A}"),
    "of an embedding that is not adapted, equal": (copied(EMBEDDING, halves(10, 8)), f"but no {EMBEDDING_A}"),
    "of a head that is not adapted, equal": (copied(HEAD, halves(10, 8)), f"for {HEAD}, but no {A}"),
    "of another layer": (copied(DOWN, halves(8, 16)), f"for {DOWN}, but no {A}"),
    "of an adapted layer": (copied(Q, halves(8, 8)), "the base's own tensors cannot be uploaded"),
    "another embedding": (OF_EMBEDDING | copied(EMBEDDING, ones(10, 8)), "is not the weight of this server's base"),
    "another head": (OF_HEAD | copied(HEAD, ones(10, 8)), "is not the weight of this server's base"),
    "a larger embedding": (OF_EMBEDDING | copied(EMBEDDING, halves(11, 8)), "must be [10, 8] and is [11, 8]"),
    "a flat head": (OF_HEAD | copied(HEAD, halves(80)), "must be [10, 8] and is [80]"),
    "a head of NaN": (OF_HEAD | copied(HEAD, ones(10, 8) * np.nan), "holds NaN or infinite values"),
    "a head beside an adapted embedding": (OF_EMBEDDING | copied(HEAD, halves(10, 8)), f"for {HEAD}, but no {A}"),
    "half an embedding": ({tensor_name(EMBEDDING, EMBEDDING_A): ones(2, 10)}, f"{EMBEDDING}, but no {EMBEDDING_B}"),
    "the other half": ({tensor_name(EMBEDDING, EMBEDDING_B): ones(8, 2)}, f"{EMBEDDING}, but no {EMBEDDING_A}"),
}


@pytest.mark.parametrize("case", BASE_COPIES)
def test_refuses_copies_of_the_base_that_are_none(case: str, tmp_path: Path) -> None:
    more, message = BASE_COPIES[case]
    weights = write_weights(tmp_path / WEIGHTS, lora_tensors() | more)
    with pytest.raises(InvalidAdapter) as caught:
        read_checkpoint(config_bytes(lora_config()), weights, WHOLE, Halves())
    assert message in caught.value.message
    assert isinstance(caught.value, AdapterIncompatible) == ("must be" in message)
    assert caught.value.param == WEIGHTS


@pytest.mark.parametrize("path", [EMBEDDING, HEAD])
def test_takes_copies_of_the_base_that_are_equal(path: str, tmp_path: Path) -> None:
    own = OF_EMBEDDING if path == EMBEDDING else OF_HEAD
    weights = write_weights(tmp_path / WEIGHTS, lora_tensors() | own | copied(path, halves(10, 8)))
    checkpoint = read_checkpoint(config_bytes(lora_config()), weights, WHOLE, Halves())
    assert path in checkpoint.sites
    assert not any(site in (EMBEDDING, HEAD) and site != path for site in checkpoint.sites)


def test_peft_saves_under_a_config_that_says_less(tmp_path: Path) -> None:
    """The refusals above are typed by hand; these files PEFT wrote itself, and only the config's word is taken back."""
    cases: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
        "DoRA": ({"use_dora": True}, {"use_dora": False}, "the config has use_dora false"),
        "module": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": None}, "lm_head.weight'"),
        "embedding": ({"target_modules": ["embed_tokens"]}, {"r": 3}, "gives that module rank 3"),
        "bias": ({"bias": "all"}, {"bias": "none"}, "the base's own tensors cannot be uploaded"),
    }
    for name, (options, taken_back, message) in cases.items():
        model = tiny_qwen2()  # whose q_proj has a bias
        base = layout_of(model)
        embedding = model.get_input_embeddings()
        vocabulary = Site(EMBEDDING, "embedding", embedding.num_embeddings, embedding.embedding_dim, False)
        base = replace(base, sites=(*base.sites, vocabulary), embedding=EMBEDDING)
        folder = tmp_path / name
        peft_model = adapted(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))
        peft_model.save_pretrained(folder, save_embedding_layers=False)
        fields = json.loads((folder / CONFIG).read_bytes()) | taken_back
        with pytest.raises(InvalidAdapter) as caught:
            read_checkpoint(config_bytes(fields), folder / WEIGHTS, base)
        assert message in caught.value.message
