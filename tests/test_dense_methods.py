"""Methods whose change of a layer is a whole matrix: what is compiled is what PEFT's own layers compute."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.numpy import load_file, save_file

from base_samples import full_layout_of
from dense_samples import (
    GPT2_KINDS,
    KINDS,
    LABELS,
    LLAMA_LINEARS,
    layer_errors,
    make_dense,
    read_dense,
)
from heddle_adapters.canonical import SiteUpdate
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.methods.torch_permutation import MAX_LENGTH, permutation_head
from peft_samples import ModelWeights, tiny_gpt2, tiny_llama, tiny_qwen2

MAKERS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}
MODELS = {name: functools.cache(maker) for name, maker in MAKERS.items()}
CASES = [(name, kind) for name in MODELS for kind in KINDS if name != "gpt2" or kind in GPT2_KINDS]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_peft_saves_fold_to_what_peft_computes(name: str, kind: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    peft_model = make_dense(model, kind, tmp_path)
    checkpoint = read_dense(model, tmp_path)
    assert checkpoint.method == LABELS[kind.partition("_")[0]]
    assert checkpoint.combination == "alone"
    assert checkpoint.is_dense
    error, effect = layer_errors(model, peft_model, checkpoint)
    assert error <= 1
    assert effect >= 100


@st.composite
def saves(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A method with sizes that fit every layer of the tiny models: widths 32, 64 and 112."""
    family = draw(st.sampled_from(sorted({kind.partition("_")[0] for kind in KINDS})))
    divisor = draw(st.sampled_from((2, 4, 8, 16)))
    families: dict[str, dict[str, Any]] = {
        "shira": {"r": draw(st.integers(1, 20))},
        "supertuning": {"sparsity": draw(st.floats(0, 0.999)), "r": draw(st.none() | st.integers(1, 9))},
        "road": {"variant": f"road_{draw(st.sampled_from((1, 2, 4)))}", "group_size": divisor},
        "oft": {
            "oft_block_size": draw(st.integers(2, 70)),
            "block_share": draw(st.booleans()),
            "coft": draw(st.booleans()),
            "eps": draw(st.floats(0.5, 3)),
            "use_cayley_neumann": draw(st.booleans()),
            "num_cayley_neumann_terms": draw(st.integers(2, 9)),
        },
        "boft": {"boft_block_size": divisor, "boft_n_butterfly_factor": 1 if divisor > 8 else draw(st.integers(1, 2))},
        "fourierft": {
            "n_frequency": draw(st.integers(1, 2048)),
            "random_loc_seed": draw(st.integers(0, 2**63 - 1)),
            "scaling": draw(st.floats(20, 300)),
        },
        "c3a": {"block_size": divisor},
        "hira": {"r": draw(st.integers(1, 40))},
    }
    options = families[family]
    if family == "supertuning" and options["r"] is not None:
        options["lora_alpha"] = draw(st.floats(0.5, 20))
    kind = next(kind for kind in KINDS if kind.partition("_")[0] == family)
    return kind, options


@settings(max_examples=60, deadline=None)
@given(
    save=saves(),
    name=st.sampled_from(("llama", "qwen2")),
    targets=st.sets(st.sampled_from(LLAMA_LINEARS), min_size=1, max_size=3),
    dtype=st.sampled_from((None, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**16),
)
def test_any_save_folds_to_what_peft_computes(
    save: tuple[str, dict[str, Any]], name: str, targets: set[str], dtype: Any, seed: int
) -> None:
    model, (kind, options) = MODELS[name](), save
    with TemporaryDirectory() as folder:
        chosen = tuple(sorted(targets))
        peft_model = make_dense(model, kind, Path(folder), seed=seed, targets=chosen, dtype=dtype, **options)
        checkpoint = read_dense(model, Path(folder))
        assert layer_errors(model, peft_model, checkpoint, seed)[0] <= 1


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 9000), share=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
def test_permutations_are_torchs_own(length: int, share: float, seed: int) -> None:
    count = round(length * share)
    drawn = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count].numpy()
    np.testing.assert_array_equal(permutation_head(length, count, seed), drawn)


@pytest.mark.slow
def test_the_longest_permutations_are_torchs_own() -> None:
    drawn = torch.randperm(MAX_LENGTH, generator=torch.Generator().manual_seed(777))[:1000].numpy()
    np.testing.assert_array_equal(permutation_head(MAX_LENGTH, 1000, 777), drawn)


def test_a_pattern_of_ranks_is_obeyed_where_peft_obeyed_it(tmp_path: Path) -> None:
    """Over layers of 4 bits; others get the config's own rank from PEFT, whatever its pattern says."""
    model = MODELS["llama"]()
    peft_model = make_dense(model, "hira", tmp_path, r=6)
    change_config(tmp_path, r=3, rank_pattern=dict.fromkeys(LLAMA_LINEARS, 6))
    assert layer_errors(model, peft_model, read_dense(model, tmp_path))[0] <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_known_before_anything_is_built(kind: str, tmp_path: Path) -> None:
    model = MODELS["qwen2"]()
    make_dense(model, kind, tmp_path)
    checkpoint = read_dense(model, tmp_path)
    updates = checkpoint.compile(ModelWeights(model)).updates
    assert checkpoint.num_row_values == sum(_num_row_values(update) for update in updates)
    assert checkpoint.num_vector_values == sum(_num_vector_values(update) for update in updates)
    assert checkpoint.num_rows == sum(update.num_rows for update in updates)


def _num_row_values(update: SiteUpdate) -> int:
    rows = 0 if update.rows is None else update.rows.a.size + update.rows.b.size
    return rows + (0 if update.delta is None else update.delta.size)


def _num_vector_values(update: SiteUpdate) -> int:
    return sum(0 if each is None else each.size for each in (update.in_scale, update.out_scale, update.bias))


def test_a_butterfly_saved_without_pefts_extension_has_one_factor(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    peft_model = make_dense(model, "boft", tmp_path)
    change_config(tmp_path, boft_n_butterfly_factor=4)
    assert layer_errors(model, peft_model, read_dense(model, tmp_path))[0] <= 1


def test_what_changes_the_sums_changes_the_identity_and_nothing_else_does(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("fourierft", {"scaling": 91.0}, True),
        ("fourierft", {"random_loc_seed": 12346}, True),
        ("fourierft", {"init_weights": True}, False),
        ("oft", {"num_cayley_neumann_terms": 6}, True),
        ("oft", {"use_cayley_neumann": False}, True),
        ("oft", {"coft": True}, True),
        ("oft", {"eps": 1.0, "module_dropout": 0.5}, False),
        ("supertuning_lora", {"lora_alpha": 8.0}, True),
        ("supertuning", {"select_top": False}, False),
        ("shira", {"random_seed": 4}, False),
        ("road_1", {"group_size": 4}, True),
        ("hira", {"hira_dropout": 0.1}, False),
    ]
    for kind, changes, is_another in cases:
        make_dense(model, kind, tmp_path)
        before = read_dense(model, tmp_path).digest
        change_config(tmp_path, **changes)
        assert (read_dense(model, tmp_path).digest != before) == is_another, (kind, changes)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Tensors = dict[str, Any]
Change = Callable[[dict[str, Any], Tensors], None]


def config(**changes: Any) -> Change:
    return lambda fields, _: fields.update(changes)


def without(part: str) -> Change:
    return lambda _, tensors: tensors.__delitem__(f"{Q}.{part}")


def resized(part: str, *shape: int) -> Change:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        tensors[f"{Q}.{part}"] = np.zeros(shape, tensors[f"{Q}.{part}"].dtype)

    return change


def added(name: str, *shape: int) -> Change:
    return lambda _, tensors: tensors.update({name: np.zeros(shape, np.float32)})


def index(part: str, *place_and_value: int) -> Change:
    *place, value = place_and_value
    return lambda _, tensors: tensors[f"{Q}.{part}"].__setitem__(tuple(place), value)


def typed(part: str, dtype: Any) -> Change:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"].astype(dtype)

    return change


def missing(field: str) -> Change:
    return lambda fields, _: fields.pop(field)


# Each changes an honest save of all layers' q_proj and k_proj.
REFUSED: dict[str, tuple[str, Change, str]] = {
    "every method: modules_to_save": ("hira", config(modules_to_save=["norm"]), "modules_to_save is set"),
    "every method: unknown option": ("hira", config(use_magic=True), "'use_magic' is set"),
    "every method: unknown tensor": ("hira", added(f"{Q}.hira_C", 2, 2), "not part of a HiRA adapter"),
    "every method: module unknown": (
        "hira",
        lambda _, tensors: tensors.update({f"{Q}x.hira_A": tensors[f"{Q}.hira_A"]}),
        "does not have: 'model.layers.0.self_attn.q_projx'",
    ),
    "every method: promised module missing": (
        "c3a",
        without("c3a_kernel"),
        "promises: model.layers.0.self_attn.q_proj",
    ),
    "HiRA rank": ("hira", config(r=10**7), "gives that module rank 10000000"),
    "HiRA rank pattern": ("hira", config(r=4, rank_pattern={"q_proj": 6}), "gives that module rank 6"),
    "HiRA regex": ("hira", config(rank_pattern={".*": 6}), "is a regular expression"),
    "HiRA without B": ("hira", without("hira_B"), "but no hira_B"),
    "HiRA B too tall": ("hira", resized("hira_B", 65, 5), "must be [64, 5] and is [65, 5]"),
    "HiRA embedding": (
        "hira",
        added("base_model.model.model.embed_tokens.hira_embedding_A", 5, 128),
        "leave the embedding out",
    ),
    "SHiRA rank": ("shira", config(r=10**9), "gives that module 128000000000 elements"),
    "SHiRA without indices": ("shira", without("shira_indices"), "but no shira_indices"),
    "SHiRA indices shape": ("shira", resized("shira_indices", 512, 2), "must be [2, 512] and is [512, 2]"),
    "SHiRA row out of range": ("shira", index("shira_indices", 0, 3, 64), "names elements outside"),
    "SHiRA column out of range": ("shira", index("shira_indices", 1, 3, 64), "names elements outside"),
    "SHiRA negative index": ("shira", index("shira_indices", 1, 3, -1), "names elements outside"),
    "SHiRA indices of Windows": ("shira", typed("shira_indices", np.float32), "tensors of the wrong type"),
    "SHiRA whole values": ("shira", typed("shira_weight", np.int32), "tensors of the wrong type"),
    "Super-Tuning sparsity": ("supertuning", config(sparsity=0.5), "gives that module 2048 elements"),
    "Super-Tuning sparsity of nothing": ("supertuning", config(sparsity=1.0), "sparsity is 1; it must be"),
    "Super-Tuning without indices": ("supertuning", config(save_precomputed_indices=False), "with it true"),
    "Super-Tuning index out of range": ("supertuning", index("supertuning_indices", 0, 4096), "names elements"),
    "Super-Tuning unexpected LoRA": ("supertuning_lora", config(r=None), "supertuning_lora_A.weight"),
    "Super-Tuning rank": ("supertuning_lora", config(r=4), "r of adapter_config.json is 4"),
    "Super-Tuning alpha": ("supertuning_lora", config(lora_alpha=1e9), "lora_alpha scales by"),
    "RoAd variant": ("road_1", config(variant="road_3"), "variant is 'road_3'; it must be one of road_1"),
    "RoAd other variant": ("road_1", config(variant="road_2"), "so that it must be [64]"),
    "RoAd odd group": ("road_1", config(group_size=7), "it must be even"),
    "RoAd huge group": ("road_1", config(group_size=2 * 10**12), "does not divide"),
    "RoAd without scales": ("road_1", without("road_alpha"), "but no road_alpha"),
    "RoAd scales too long": ("road_1", resized("road_alpha", 33), "must be [32] and is [33]"),
    "OFT bias": ("oft", config(bias="oft_only"), "bias is not 'none'"),
    "OFT of another block size": ("oft", config(oft_block_size=16), "gives that module 120 numbers a block"),
    "OFT of a huge block size": ("oft", config(oft_block_size=10**12), "gives that module 2016 numbers a block"),
    "OFT both sizes": ("oft", config(r=8), "one of them must be set"),
    "OFT of neither size": ("oft", config(oft_block_size=0), "one of them must be set"),
    "OFT of before 0.14": ("oft", missing("oft_block_size"), "oft_block_size is missing"),
    "OFT shared": ("oft", config(block_share=True), "block_share of adapter_config.json gives that module 1 blocks"),
    "OFT series of old": ("oft", config(peft_version="0.17.1"), "use_cayley_neumann=False"),
    "OFT series of no version": ("oft", missing("peft_version"), "peft_version does not say 0.18 or later"),
    "OFT by default, of no version": (
        "oft",
        lambda fields, _: (fields.pop("use_cayley_neumann"), fields.pop("peft_version"))[0],
        "peft_version does not say 0.18",
    ),
    "OFT terms": ("oft", config(num_cayley_neumann_terms=10**9), "at most 64 are served"),
    "OFT eps": ("oft_constrained", config(eps=0), "with coft it must be more than 0"),
    "OFT of before 0.16": ("oft", added(f"{Q}.oft_r", 2, 2), "before 0.16"),
    "BOFT bias": ("boft", config(bias="all"), "bias is not 'none'"),
    "BOFT of another block size": ("boft", config(boft_block_size=4), "makes it [1, 16, 4, 4]"),
    "BOFT of a block size that does not divide": ("boft", config(boft_block_size=9), "does not divide"),
    "BOFT of a huge block size": ("boft", config(boft_block_size=10**12), "does not divide"),
    "BOFT both sizes": ("boft", config(boft_block_num=8), "one of them must be set"),
    "BOFT factors": ("boft_butterfly", config(boft_n_butterfly_factor=2), "is 2; upload"),
    "BOFT without scale": ("boft", without("boft_s"), "but no boft_s"),
    "BOFT scale transposed": ("boft", resized("boft_s", 1, 64), "must be [64, 1] and is [1, 64]"),
    "FourierFT bias": ("fourierft", config(bias="all"), "bias is not 'none'"),
    "FourierFT frequencies": ("fourierft", config(n_frequency=10**9), "gives modules 1e+09 frequencies"),
    "FourierFT spectrum of two dimensions": ("fourierft", resized("fourierft_spectrum", 300, 1), "has shape [300, 1]"),
    "FourierFT too many frequencies": (
        "fourierft",
        lambda fields, tensors: (
            fields.update(n_frequency=4097),
            tensors.update({name: np.zeros(4097, np.float32) for name in tensors}),
        )[0],
        "may be at most 4096 there",
    ),
    "FourierFT scaling": ("fourierft", config(scaling=1e9), "scaling is 1e+09; at most"),
    "FourierFT seed": ("fourierft", config(random_loc_seed=None), "random_loc_seed must be a whole number"),
    "FourierFT negative seed": ("fourierft", config(random_loc_seed=-1), "random_loc_seed must be a whole number"),
    "C3A bias": ("c3a", config(bias="c3a_only"), "bias is not 'none'"),
    "C3A of another block size": ("c3a", config(block_size=32), "gives modules blocks of 32"),
    "C3A of a block size that does not divide": (
        "c3a",
        lambda fields, tensors: (
            fields.update(block_size=3),
            tensors.update({f"{Q}.c3a_kernel": np.zeros((21, 21, 3), np.float32)}),
        )[0],
        "must divide 64 and 64",
    ),
    "C3A kernel": ("c3a", resized("c3a_kernel", 4, 3, 16), "must be [4, 4, 16] and is [4, 3, 16]"),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Tensors]]:
    """A save's config and tensors, made once for each kind."""

    @functools.cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        make_dense(MODELS["llama"](), kind, folder, targets=("q_proj", "k_proj"))
        return folder

    def copies(kind: str) -> tuple[dict[str, Any], Tensors]:
        fields = json.loads((make(kind) / "adapter_config.json").read_text())
        tensors = {name: value.copy() for name, value in load_file(make(kind) / "adapter_model.safetensors").items()}
        return fields, tensors

    return copies


def compiled(fields: dict[str, Any], tensors: Tensors, folder: Path, **base: Any) -> Checkpoint:
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights)
    model = MODELS["llama"]()
    checkpoint = read_checkpoint(json.dumps(fields).encode(), weights, replace(full_layout_of(model), **base))
    checkpoint.compile(ModelWeights(model))
    return checkpoint


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, honest: Callable[[str], tuple[dict[str, Any], Tensors]], tmp_path: Path) -> None:
    kind, change, message = REFUSED[case]
    fields, tensors = honest(kind)
    change(fields, tensors)
    with pytest.raises(InvalidAdapter) as caught:
        compiled(fields, tensors, tmp_path)
    assert message in caught.value.message
    assert caught.value.message.rstrip().endswith(".")


@pytest.mark.parametrize("kind", KINDS)
def test_is_taken_only_where_the_operator_allows_it(
    kind: str, honest: Callable[[str], tuple[dict[str, Any], Tensors]], tmp_path: Path
) -> None:
    compiled(*honest(kind), tmp_path)
    with pytest.raises(InvalidAdapter, match="--allow-dense-adapters"):
        compiled(*honest(kind), tmp_path, allows_dense=False)


def test_a_layer_longer_than_torchs_short_permutations_is_refused(
    honest: Callable[[str], tuple[dict[str, Any], Tensors]], tmp_path: Path
) -> None:
    fields, tensors = honest("fourierft")
    sites = tuple(
        replace(site, in_features=2**15, out_features=2**13) for site in full_layout_of(MODELS["llama"]()).sites
    )
    with pytest.raises(InvalidAdapter, match="served up to 214748363"):
        compiled(fields, tensors, tmp_path, sites=sites)
