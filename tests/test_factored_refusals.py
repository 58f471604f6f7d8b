"""Factored methods refuse, with the field and a remedy, whatever is not exactly what PEFT would have computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from factored_samples import CONFIG, CONFIGS, WEIGHTS
from factored_uploads import (
    BASE,
    Change,
    Fields,
    Tensors,
    both,
    config,
    extra,
    read,
    renamed,
    saved,
    tensor,
    unchanged,
    without,
)
from heddle_adapters.adapter_config import DESCRIPTIVE_FIELDS
from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from heddle_adapters.methods import (
    block_grid,
    bounded_directions,
    factor_products,
    reflections,
    replaced_subspaces,
    shared_projections,
    shared_vector,
    tied_vectors,
    tiled_shards,
    vector_bank,
    weight_networks,
)
from peft_samples import ModelWeights, tiny_llama

LAYER = "base_model.model.model.layers.0.self_attn."
FAMILIES: dict[str, ModuleType] = {
    "deft": replaced_subspaces,
    "delora": bounded_directions,
    "gralora": block_grid,
    "hra": reflections,
    "loha": factor_products,
    "lokr": factor_products,
    "miss": tiled_shards,
    "para": replaced_subspaces,
    "peanut": weight_networks,
    "pvera": shared_projections,
    "tinylora": tied_vectors,
    "unilora": shared_vector,
    "vblora": vector_bank,
    "vera": shared_projections,
}


# What holds for every one of them


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_pefts_config_is_known(kind: str) -> None:
    family = FAMILIES[kind.partition("_")[0]]
    known = family.READ_FIELDS | family.HARMLESS_FIELDS | DESCRIPTIVE_FIELDS | {"modules_to_save"}
    own = {"pvera_dropout", "sample_at_inference", "vera_dropout"}
    assert json.loads(saved(kind)[0]).keys() <= known | (own if family is shared_projections else set())


@pytest.mark.parametrize("kind", CONFIGS)
def test_refuses_absurd_ranks_before_anything_is_made(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"adapter_config.json: r is 10000000; at most 8192 is served"):
        read(kind, config(r=10**7), tmp_path)


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"lokr", "lokr_uneven", "lokr_whole", "unilora"}))
def test_refuses_a_rank_that_is_not_the_files(kind: str, tmp_path: Path) -> None:
    """Where a whole matrix is in the file, or only a vector, the rank is the config's alone."""
    rank = json.loads(saved(kind)[0])["r"]
    with pytest.raises(InvalidAdapter, match=r"r (or rank_pattern )?of adapter_config.json gives|divide"):
        read(kind, config(r=rank + 1), tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_refuses_files_that_lack_a_tensor(kind: str, tmp_path: Path) -> None:
    tensors = saved(kind)[1]
    for name in tensors if len(tensors) > 1 else ():
        with pytest.raises(InvalidAdapter, match=r"has no |but no |has nothing for modules"):
            read(kind, without(name), tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_refuses_tensors_of_another_shape(kind: str, tmp_path: Path) -> None:
    def grown(value: Any) -> Any:
        return np.concatenate([value, value], axis=axis)

    for name, value in saved(kind)[1].items():
        for axis in range(value.ndim):
            if name.startswith(("base_model.vera_", "base_model.pvera_")) and axis == ("A" in name[-1]):
                continue  # wider shared matrices are taken
            with pytest.raises(InvalidAdapter) as caught:
                read(kind, tensor(name, grown), tmp_path)
            assert (
                name in caught.value.message
                or "do not divide" in caught.value.message
                or "make a matrix" in str(caught)
            )


@pytest.mark.parametrize("kind", CONFIGS)
def test_refuses_foreign_tensors(kind: str, tmp_path: Path) -> None:
    for name in (LAYER + "q_proj.lora_A.weight", LAYER + "q_proj.weight", "base_model.model.lm_head.weight", "x"):
        with pytest.raises(InvalidAdapter, match="has 1 tensors that are not part of a"):
            read(kind, extra(name, 2, 2), tmp_path)
    with pytest.raises(InvalidAdapter, match="base's own tensors cannot be uploaded"):
        read(kind, extra(LAYER + "q_proj.base_layer.weight", 2, 2), tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_refuses_what_no_method_serves(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="modules_to_save is set"):
        read(kind, config(modules_to_save=["lm_head"]), tmp_path)
    with pytest.raises(InvalidAdapter, match=r"bias is not 'none'|'bias' is set, and this server does not know"):
        read(kind, config(bias="all"), tmp_path)
    with pytest.raises(InvalidAdapter, match="'from_the_future' is set"):
        read(kind, config(from_the_future=1), tmp_path)


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"miss_mini", "unilora"}))
def test_refuses_another_base(kind: str, tmp_path: Path) -> None:
    sites = (replace(site, in_features=2 * site.in_features, out_features=2 * site.out_features) for site in BASE.sites)
    with pytest.raises(AdapterIncompatible, match="upload it where the base it was trained on is served"):
        read(kind, unchanged, tmp_path, replace(BASE, sites=tuple(sites)))


@pytest.mark.parametrize("kind", ["miss_bat", "lokr_whole"])
def test_updates_of_full_rank_need_the_operators_consent(kind: str, tmp_path: Path) -> None:
    assert read(kind, unchanged, tmp_path).is_dense
    with pytest.raises(InvalidAdapter, match="--allow-dense-adapters"):
        read(kind, unchanged, tmp_path, replace(BASE, allows_dense=False))


# What is particular to one

Q_BANK, V_BANK = LAYER + "q_proj.vblora_logits_A", LAYER + "v_proj.vblora_logits_B"
REFUSED: dict[str, tuple[str, Change, str]] = {
    "VeRA seed a string": ("vera_drawn", config(projection_prng_key="1"), "projection_prng_key must be a whole number"),
    "VeRA seed negative": ("vera_drawn", config(projection_prng_key=-1), "projection_prng_key must be a whole number"),
    "VeRA saved, not promised": ("vera", config(save_projection=False), "2 tensors that are not part of a VeRA"),
    "VeRA promised, not saved": ("vera_drawn", config(save_projection=True), "has no vera_A, which its modules share"),
    "VeRA save_projection null": ("vera", config(save_projection="no"), "save_projection must be true or false"),
    "PVeRA sampling": ("pvera", config(sample_at_inference=True), "sample_at_inference is true"),
    "VB-LoRA bank": ("vblora", config(num_vectors=29), "vblora_vector_bank has shape [30, 16], but num_vectors of"),
    "VB-LoRA length": ("vblora", config(vector_length=8), "vblora_vector_bank has shape [30, 16], but vector_length"),
    "VB-LoRA more chosen than there are": ("vblora", config(topk=31), "topk is 31, more than num_vectors, 30"),
    "VB-LoRA other choice": ("vblora_chosen", config(topk=2), "topk of adapter_config.json gives 2 for axis 2"),
    "VB-LoRA not only the chosen": ("vblora_chosen", config(save_only_topk_weights=False), "are not part of a VB-LoRA"),
    "VB-LoRA float indices": (
        "vblora_chosen",
        tensor(Q_BANK + "_topk_indices", lambda value: value.astype(np.float32)),
        "wrong type, whole numbers or floating-point",
    ),
    "VB-LoRA odd length": (
        "vblora",
        both(
            config(vector_length=24), tensor("base_model.vblora_vector_bank", lambda _: np.ones((30, 24), np.float32))
        ),
        "cuts model.layers.0.self_attn.q_proj into 24 equal parts, and its 64 features do not divide so",
    ),
    "Uni-LoRA regex": ("unilora", config(target_modules="(a+)+$"), "target_modules is a regular expression"),
    "Uni-LoRA no targets": ("unilora", config(target_modules=[]), "target_modules is empty"),
    "Uni-LoRA other targets": ("unilora", config(target_modules=["query"]), "target_modules names none of the layers"),
    "Uni-LoRA layers": ("unilora", config(layers_to_transform=[0]), "layers_to_transform is set"),
    "Uni-LoRA layer 0": ("unilora", config(layers_to_transform=0), "layers_to_transform is set"),
    "Uni-LoRA theta": ("unilora", config(theta_d_length=99), "unilora_theta_d has shape [100], but theta_d_length"),
    "Uni-LoRA seed": ("unilora", config(proj_seed=None), "proj_seed must be a whole number"),
    "TinyLoRA without projections": ("tinylora", config(save_projection=False), "save_projection is false"),
    "TinyLoRA tying": ("tinylora", config(weight_tying=1.5), "weight_tying must be between 0 and 1"),
    "TinyLoRA tied more": ("tinylora", config(weight_tying=0.5), "2 tensors that are not part of a TinyLoRA"),
    "TinyLoRA tied less": ("tinylora_tied", config(weight_tying=0), "has no tinylora_v.2, which its modules share"),
    "TinyLoRA vectors": ("tinylora", config(u=6), "but u of adapter_config.json gives 6"),
    "LoHa of a convolution": ("loha", extra(LAYER + "q_proj.hada_t1", 2, 2), "adapters of convolutions are not served"),
    "LoHa scale": ("loha", config(alpha=10**6), "alpha or alpha_pattern, over r, scales"),
    "LoHa pattern": ("loha", config(rank_pattern={"q_proj": 5}), "r or rank_pattern of adapter_config.json gives 5"),
    "LoHa regex": ("loha", config(alpha_pattern={"(a+)+$": 5}), "is a regular expression"),
    "LoKr rank": ("lokr_both", config(r=4), "r or rank_pattern of adapter_config.json gives 4"),
    "LoKr twice": ("lokr_both", extra(LAYER + "q_proj.lokr_w1", 8, 8), "are not part of a LoKr"),
    "LoKr of a convolution": ("lokr_whole", extra(LAYER + "q_proj.lokr_w2", 8, 8, 3), "must be a matrix; adapters of"),
    "LoKr of other sizes": ("lokr_whole", extra(LAYER + "q_proj.lokr_w2", 8, 4), "make a matrix of [64, 32], but the"),
    "MiSS variant": ("miss", config(init_weights="olora"), "init_weights is 'olora'; served are"),
    "MiSS variant a list": ("miss", config(init_weights=[1]), "init_weights is '[1]'; served are"),
    "MiSS that is mini": ("miss", config(init_weights="mini"), "mini_r of adapter_config.json gives 1 for axis 1"),
    "MiSS mini of another width": ("miss_mini", config(mini_r=4), "mini_r of adapter_config.json gives 4 for axis 1"),
    "MiSS mini odd": ("miss_mini", config(mini_r=7), "mini_r cuts model.layers.0.self_attn.q_proj into 7 equal parts"),
    "MiSS that is bat": ("miss", config(init_weights="bat"), "r of adapter_config.json gives 4 for axis 1"),
    "MiSS wide": (
        "miss",
        both(config(r=65), extra(LAYER + "q_proj.miss_block", 65, 64)),
        "r is 65, more than the 64 input features",
    ),
    "GraLoRA pieces": ("gralora", config(gralora_k=3), "gralora_k is 3 and does not divide r, 16"),
    "GraLoRA odd pieces": (
        "gralora",
        config(gralora_k=3, r=15),
        "gralora_k cuts model.layers.0.self_attn.q_proj into 3",
    ),
    "GraLoRA rank": ("gralora", config(gralora_k=1024, r=4096), "is 4194304, the rank of the whole update"),
    "GraLoRA hybrid": ("gralora", config(hybrid_r=2), "has gralora_A and gralora_B for"),
    "GraLoRA no hybrid": ("gralora_hybrid", config(hybrid_r=0), "8 tensors that are not part of a GraLoRA"),
    "GraLoRA other hybrid": ("gralora_hybrid", config(hybrid_r=4), "hybrid_r of adapter_config.json gives 4"),
    "GraLoRA hybrid negative": ("gralora", config(hybrid_r=-1), "hybrid_r must be a whole number of at least 0"),
    "DeLoRA pattern": (
        "delora",
        config(rank_pattern={"q_proj": 5}),
        "r or rank_pattern of adapter_config.json gives 5",
    ),
    "DEFT decomposition": (
        "deft",
        config(decomposition_method="lu"),
        "decomposition_method is 'lu'; served are relu, qr",
    ),
    "DEFT that is PaRa": ("deft", config(para=True), "4 tensors that are not part of a PaRa"),
    "PaRa that is DEFT": ("para", config(para=False), "but no deft_R"),
    "DEFT scale": ("deft", config(alpha=10**6), "alpha over r scales"),
    "PEANuT activation": ("peanut", config(act_fn="gelu"), "act_fn is 'gelu'; served are gelu_new"),
    "PEANuT depth": ("peanut", config(depth=65), "depth is 65; at most 64"),
    "PEANuT deeper": ("peanut", config(depth=1), "but no peanut_encoders.0.weight"),
    "PEANuT shallower": ("peanut_deep", config(depth=2), "8 tensors that are not part of a PEANuT"),
    "another module": (
        "hra",
        renamed(LAYER + "q_proj.hra_u", LAYER + "query.hra_u"),
        "changes modules that tiny llama does not have",
    ),
    "twice": ("hra", extra(LAYER.removeprefix("base_model.model.") + "q_proj.hra_u", 64, 4), "keep one of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, tmp_path: Path) -> None:
    kind, change, message = REFUSED[case]
    with pytest.raises(InvalidAdapter) as caught:
        read(kind, change, tmp_path)
    assert message in caught.value.message
    assert caught.value.param in (CONFIG, WEIGHTS)
    assert caught.value.param in caught.value.message


def zero_column(vectors: Any) -> Any:
    return vectors * np.array([1, 1, 0, 1], np.float32)


def repeated_column(vectors: Any) -> Any:
    return vectors[:, [0, 1, 0, 3]]


def one_index(value: int) -> Callable[[Any], Any]:
    def edit(indices: Any) -> Any:
        indices = indices.copy()
        indices.flat[7] = value
        return indices

    return edit


INDICES = LAYER + "v_proj.unilora_indices_B"
REFUSED_WHEN_COMPILED: dict[str, tuple[str, Change, str]] = {
    "VB-LoRA": (
        "vblora_chosen",
        tensor(Q_BANK + "_topk_indices", one_index(30)),
        "holds 30, but vblora_vector_bank has",
    ),
    "VB-LoRA below": (
        "vblora_large_bank",
        tensor(V_BANK + "_topk_indices", one_index(-1)),
        "holds -1, but vblora_vector",
    ),
    "Uni-LoRA": (
        "unilora_saved",
        tensor(INDICES, one_index(100)),
        "holds 100, but unilora_theta_d has the entries 0 to 99",
    ),
    "Uni-LoRA below": ("unilora_saved", tensor(INDICES, one_index(-1)), "holds -1, but unilora_theta_d"),
    "HRA": ("hra", tensor(LAYER + "q_proj.hra_u", zero_column), "vector 2 of hra_u"),
    "HRA orthogonal": ("hra_orthogonal", tensor(LAYER + "q_proj.hra_u", repeated_column), "vector 2 of hra_u"),
}


@pytest.mark.parametrize("case", REFUSED_WHEN_COMPILED)
def test_refuses_what_only_the_numbers_show(case: str, tmp_path: Path) -> None:
    kind, change, message = REFUSED_WHEN_COMPILED[case]
    checkpoint = read(kind, change, tmp_path)
    with pytest.raises(InvalidAdapter, match=r"upload a trained checkpoint|save the adapter again") as caught:
        checkpoint.compile(ModelWeights(tiny_llama()))
    assert message in caught.value.message
    assert caught.value.param == WEIGHTS


WIDE = BaseLayout(
    model_name="wide", fingerprint="sha256:0", quantization="none", sites=(Site("q", "linear", 2**14, 2**14, False),)
)


def test_draws_no_more_random_numbers_than_is_sound(tmp_path: Path) -> None:
    def wide_vera(fields: Fields, tensors: Tensors) -> None:
        fields.update(r=8192, target_modules=["q"])
        tensors.clear()
        tensors["q.vera_lambda_b"] = np.ones(2**14, np.float32)
        tensors["q.vera_lambda_d"] = np.ones(8192, np.float32)

    with pytest.raises(InvalidAdapter, match="r 8192 asks for 268435456 random numbers; at most 67108864 are drawn"):
        read("vera_drawn", wide_vera, tmp_path, WIDE)
    with pytest.raises(InvalidAdapter, match="takes 268435456 drawn indices; at most 33554432 are drawn"):
        read("unilora", config(r=8192, target_modules=["q"]), tmp_path, WIDE)


# Identity


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("loha", {"alpha": 7}),
        ("loha", {"alpha_pattern": {"q_proj": 7}}),
        ("lokr_whole", {"r": 65}),
        ("lokr_whole", {"rank_pattern": {"q_proj": 65}}),
        ("gralora", {"alpha": 7}),
        ("hra", {"apply_GS": True}),
        ("deft", {"alpha": 7}),
        ("deft", {"decomposition_method": "qr"}),
        ("peanut", {"act_fn": "tanh"}),
        ("peanut", {"scaling": 3}),
        ("vera_drawn", {"projection_prng_key": 7}),
        ("unilora", {"proj_seed": 7}),
        ("unilora", {"r": 5}),
        ("unilora", {"target_modules": ["q_proj"]}),
        ("vblora", {"topk": 2}),
        ("tinylora_tied", {"weight_tying": 0.625}),
    ],
)
def test_digest_tells_apart_what_computes_something_else(kind: str, changes: Fields, tmp_path: Path) -> None:
    assert read(kind, config(**changes), tmp_path).digest != read(kind, unchanged, tmp_path).digest


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("loha", {"rank_dropout": 0.5, "module_dropout": 0.5, "use_effective_conv2d": True}),
        ("lokr_both", {"decompose_factor": 8, "init_weights": "lycoris"}),
        ("gralora", {"gralora_dropout": 0.5, "fan_in_fan_out": True}),
        ("delora", {"delora_lambda": 3, "lambda_pattern": {"q_proj": 2}, "module_dropout": 0.5}),
        ("deft", {"deft_dropout": 0.5, "init_scale": 3}),
        ("miss", {"miss_dropout": 0.5, "mini_r": 4, "init_weights": False}),
        ("vera", {"vera_dropout": 0.5, "d_initial": 1, "projection_prng_key": 7}),
        ("pvera", {"generator_seed": 3}),
        ("unilora_saved", {"proj_seed": 7, "target_modules": ["self_attn.q_proj", "v_proj"]}),
        ("unilora", {"target_modules": ["v_proj", "q_proj"]}),
        ("vblora", {"init_logits_std": 3, "init_vector_bank_bound": 1}),
        ("tinylora", {"init_v_bound": 3, "projection_seed": 7}),
    ],
)
def test_digest_ignores_what_computes_nothing(kind: str, changes: Fields, tmp_path: Path) -> None:
    assert read(kind, config(**changes), tmp_path).digest == read(kind, unchanged, tmp_path).digest
