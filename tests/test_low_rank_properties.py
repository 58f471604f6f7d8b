"""Whatever ranks, scales, modules and dtypes a file of the LoRA family has: its fold equals the formula, in float64."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.canonical import Floats, SiteUpdate
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.errors import InvalidAdapter

Doubles = NDArray[np.float64]
PREFIX = "base_model.model."
SITES = (
    Site("model.layers.0.self_attn.q_proj", "linear", 8, 12, has_bias=True),
    Site("model.layers.0.self_attn.v_proj", "linear", 8, 4, has_bias=False),
    Site("model.layers.1.self_attn.q_proj", "linear", 8, 8, has_bias=True),
    Site("model.layers.1.mlp.down_proj", "linear", 16, 8, has_bias=False),
)
BASE = BaseLayout(model_name="hand-made", fingerprint="sha256:0", quantization="none", sites=SITES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = ("plain", "bias", "dora", "bd_a", "bd_b", "pissa", "olora", "kasa", "adalora")


class RandomWeights:
    """`source.BaseWeights` of the hand-made base."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._weights = {
            site.path: generator.standard_normal((site.out_features, site.in_features)).astype(np.float32)
            for site in SITES
        }
        self._biases = {
            site.path: generator.standard_normal(site.out_features).astype(np.float32)
            for site in SITES
            if site.has_bias
        }

    def weight(self, path: str) -> Floats:
        return self._weights[path]

    def bias(self, path: str) -> Floats | None:
        return self._biases.get(path)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Any]:
    chosen = draw(st.lists(st.sampled_from(SITES), min_size=1, unique=True))
    ranks = {site.path: draw(st.integers(1, 3)) for site in chosen}
    alphas = {site.path: draw(st.floats(0.25, 16)) for site in chosen}
    return {
        "sites": chosen,
        "variant": draw(st.sampled_from(VARIANTS)),
        "ranks": ranks,
        "alphas": alphas,
        "is_rank_stabilised": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "has_base_biases": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def written(adapter: dict[str, Any], folder: Path) -> dict[str, dict[str, Doubles]]:
    """Writes the two files; answers with each module's tensors as the file holds them."""
    generator = torch.Generator().manual_seed(adapter["seed"])
    variant, tensors, stored = adapter["variant"], {}, {}

    def tensor(name: str, *shape: int) -> Doubles:
        value = (torch.randn(shape, generator=generator) * 0.4).to(adapter["dtype"])
        tensors[PREFIX + name] = value
        return value.double().numpy()

    for site in adapter["sites"]:
        path, rank = site.path, rank_of(adapter, site)
        suffix = "" if variant == "adalora" else ".weight"
        blocks_a, blocks_b = (2 if variant == kind else 1 for kind in ("bd_a", "bd_b"))
        stored[path] = {
            "a": tensor(f"{path}.lora_A{suffix}", rank, site.in_features // blocks_a),
            "b": tensor(f"{path}.lora_B{suffix}", site.out_features, rank // blocks_b),
        }
        if variant == "bias":
            stored[path]["bias"] = tensor(f"{path}.lora_B.bias", site.out_features)
        if variant == "dora":
            stored[path]["m"] = tensor(f"{path}.lora_magnitude_vector", site.out_features)
        if variant == "kasa":
            stored[path]["e"] = tensor(f"{path}.lora_diag", rank)
        if variant == "adalora":
            stored[path]["e"] = tensor(f"{path}.lora_E", rank, 1)
        if adapter["has_base_biases"] and site.has_bias:
            stored[path]["b0"] = tensor(f"{path}.base_layer.bias", site.out_features)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config_of(adapter)))
    return stored


def rank_of(adapter: dict[str, Any], site: Site) -> int:
    rank: int = adapter["ranks"][site.path]
    return 2 * rank if adapter["variant"].startswith("bd") else rank


def config_of(adapter: dict[str, Any]) -> dict[str, Any]:
    variant, paths = adapter["variant"], [site.path for site in adapter["sites"]]
    common = {"bias": "lora_only" if adapter["has_base_biases"] else "none", "target_modules": paths}
    if variant == "adalora":
        kept = {site.path: [True] * rank_of(adapter, site) + [False] for site in adapter["sites"]}
        pattern = {f"{path}.lora_E": rows for path, rows in kept.items()}
        return {**common, "peft_type": "ADALORA", "init_r": 4, "lora_alpha": 3, "rank_pattern": pattern}
    return {
        **common,
        "peft_type": "LORA",
        "r": 1,
        "rank_pattern": {site.path: rank_of(adapter, site) for site in adapter["sites"]},
        "alpha_pattern": adapter["alphas"],
        "use_rslora": adapter["is_rank_stabilised"],
        "lora_bias": variant == "bias",
        "use_dora": variant == "dora",
        "init_lora_weights": variant if variant in ("pissa", "olora") else True,
        "kasa_config": {"beta": 0.1} if variant == "kasa" else None,
        "use_bdlora": {
            "nblocks": 2,
            "target_modules_bd_a": paths if variant == "bd_a" else None,
            "target_modules_bd_b": paths if variant == "bd_b" else None,
        }
        if variant.startswith("bd")
        else None,
    }


def in_full(
    adapter: dict[str, Any], site: Site, own: dict[str, Doubles], weights: RandomWeights, x: Doubles
) -> Doubles:
    """What the module answers, as the methods' papers and PEFT's layers have it."""
    variant, rank = adapter["variant"], rank_of(adapter, site)
    weight = weights.weight(site.path).astype(np.float64)
    if variant == "adalora":
        scale = 3 / (4 + 1e-5)
    else:
        scale = adapter["alphas"][site.path] / (np.sqrt(rank) if adapter["is_rank_stabilised"] else rank)
    a, b = (block_diagonal(own[part], 2 if variant == f"bd_{part}" else 1) for part in ("a", "b"))
    if "e" in own:
        b = b * own["e"].reshape(-1)
    if variant in ("pissa", "kasa"):
        u, values, vt = np.linalg.svd(weight, full_matrices=False)
        part = slice(0, rank) if variant == "pissa" else slice(len(values) - rank, None)
        weight = weight - (u[:, part] * values[part]) @ vt[part]
    if variant == "olora":
        q, r = np.linalg.qr(weight)
        weight = weight - scale * q[:, :rank] @ r[:rank]
    weight = weight + scale * b @ a
    if variant == "dora":
        weight = weight * (own["m"] / np.linalg.norm(weight, axis=1))[:, None]
    b0 = weights.bias(site.path)
    bias = own.get("b0", 0.0 if b0 is None else b0)
    return x @ weight.T + bias + scale * own.get("bias", 0.0)


def block_diagonal(stored: Doubles, num_blocks: int) -> Doubles:
    height, width = len(stored) // num_blocks, stored.shape[1]
    whole = np.zeros((len(stored), width * num_blocks))
    for block in range(num_blocks):
        rows = slice(block * height, (block + 1) * height)
        whole[rows, block * width : (block + 1) * width] = stored[rows]
    return whole


def applied(update: SiteUpdate, weights: RandomWeights, x: Doubles) -> Doubles:
    """The canonical form's formula."""
    assert update.rows is not None
    b0 = weights.bias(update.site)
    out_scale = 1.0 if update.out_scale is None else update.out_scale.astype(np.float64)
    y: Doubles = out_scale * (x @ weights.weight(update.site).astype(np.float64).T)
    y = y + (0 if b0 is None else b0) + (0 if update.bias is None else update.bias.astype(np.float64))
    return y + (update.rows.gain * (x @ update.rows.a.T.astype(np.float64))) @ update.rows.b


@settings(max_examples=150, deadline=None)
@given(adapters())
def test_fold_equals_formula(adapter: dict[str, Any]) -> None:
    weights = RandomWeights(adapter["seed"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored = written(adapter, folder)
        files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        checkpoint = read_checkpoint(*files, BASE, weights)
        try:
            compiled = checkpoint.compile(weights)
        except InvalidAdapter as error:  # two singular values of the random weight are as good as equal
            assume("not determined" not in error.message)
            raise
    assert [update.site for update in compiled.updates] == [site.path for site in SITES if site in adapter["sites"]]
    assert checkpoint.num_row_values == sum(
        u.rows.a.size + u.rows.b.size for u in compiled.updates if u.rows is not None
    )
    x = np.random.default_rng(adapter["seed"]).standard_normal((3, 16))
    for update in compiled.updates:
        site = BASE.site(update.site)
        inputs = x[:, : site.in_features]
        expected = in_full(adapter, site, stored[site.path], weights, inputs)
        bound = 1e-5 * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(applied(update, weights, inputs), expected, atol=bound, rtol=0)
