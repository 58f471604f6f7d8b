"""Whatever is saved beside a LoRA: every weight and bias of the base becomes what the file says, in any combination."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.torch import save_file

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.canonical import CompiledAdapter, Floats
from heddle_adapters.checkpoint import read_checkpoint

Q, V, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.input_layernorm"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
VOCABULARY, WIDTH, RANK, ALPHA = 9, 6, 2, 3.0
TOKENS = "token_adapter.trainable_tokens_delta"
SITES = (
    Site(Q, "linear", WIDTH, WIDTH, has_bias=True),
    Site(V, "linear", WIDTH, 4, has_bias=True),
    Site(NORM, "norm", WIDTH, WIDTH, has_bias=True, weight_offset=1.0),
    Site(EMBEDDING, "embedding", VOCABULARY, WIDTH, has_bias=False, output_scale=2.0),
    Site(HEAD, "linear", WIDTH, VOCABULARY, has_bias=False),
)
BASE = BaseLayout(
    model_name="hand-made",
    fingerprint="sha256:0",
    quantization="none",
    sites=SITES,
    embedding=EMBEDDING,
    head=HEAD,
    allows_dense=True,
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RandomWeights:
    """`source.BaseWeights` of the hand-made base, whose head may be tied to its embedding."""

    def __init__(self, is_tied: bool) -> None:
        generator = np.random.default_rng(0)
        shapes = {Q: (WIDTH, WIDTH), V: (4, WIDTH), NORM: (WIDTH,), EMBEDDING: (VOCABULARY, WIDTH)}
        shapes[HEAD] = shapes[EMBEDDING]
        self.weights = {path: generator.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
        if is_tied:
            self.weights[HEAD] = self.weights[EMBEDDING]
        self.biases = {
            site.path: generator.standard_normal(site.out_features).astype(np.float32)
            for site in SITES
            if site.has_bias
        }

    def weight(self, path: str) -> Floats:
        return self.weights[path]

    def bias(self, path: str) -> Floats | None:
        return self.biases.get(path)


TOKEN_IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5, unique=True)


@st.composite
def companions(draw: st.DrawFn) -> dict[str, Any]:
    saved = draw(st.sets(st.sampled_from([V, NORM, EMBEDDING, HEAD])))
    tokens = {path: draw(TOKEN_IDS) for path in (EMBEDDING, HEAD) if path not in saved and draw(st.booleans())}
    if len(tokens) == 2 and draw(st.booleans()):
        tokens[HEAD] = tokens[EMBEDDING]
    is_tied, keeps_tied = draw(st.booleans()), draw(st.booleans())
    if is_tied and keeps_tied and saved & {EMBEDDING, HEAD}:
        tokens = {}  # both are saved, as one weight
        saved = saved | {EMBEDDING}
    if is_tied and HEAD in saved:
        tokens.pop(EMBEDDING, None)
    is_free = EMBEDDING not in saved and EMBEDDING not in tokens
    return {
        "saved": saved,
        "tokens": tokens,
        "adapts_embedding": is_free and draw(st.booleans()),
        "has_all_biases": draw(st.booleans()),
        "is_tied": is_tied,
        "keeps_tied": keeps_tied,
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def uploaded(case: dict[str, Any], weights: RandomWeights) -> tuple[dict[str, Any], dict[str, Any], RandomWeights]:
    """The config, the tensors, and the weights and biases that the adapted base has in the end."""
    generator = torch.Generator().manual_seed(case["seed"])
    tensors: dict[str, Any] = {}
    wanted = RandomWeights(case["is_tied"])

    def tensor(name: str, *shape: int) -> Floats:
        tensors[f"base_model.model.{name}"] = torch.randn(shape, generator=generator).to(case["dtype"])
        return np.asarray(tensors[f"base_model.model.{name}"].float())

    scale = ALPHA / RANK
    a, b = tensor(f"{Q}.lora_A.weight", RANK, WIDTH), tensor(f"{Q}.lora_B.weight", WIDTH, RANK)
    wanted.weights[Q] = np.asarray(weights.weight(Q) + scale * b @ a, np.float32)
    if case["adapts_embedding"]:
        a = tensor(f"{EMBEDDING}.lora_embedding_A", RANK, VOCABULARY)
        b = tensor(f"{EMBEDDING}.lora_embedding_B", WIDTH, RANK)
        wanted.weights[EMBEDDING] = np.asarray(weights.weight(EMBEDDING) + scale * (b @ a).T, np.float32)
    is_one = case["is_tied"] and case["keeps_tied"] and EMBEDDING in case["saved"]
    for path in sorted(case["saved"]):
        if not (is_one and path == HEAD):
            wanted.weights[path] = tensor(f"{path}.weight", *weights.weight(path).shape)
        if path in wanted.biases:
            wanted.biases[path] = tensor(f"{path}.bias", *weights.biases[path].shape)
    if is_one:
        tensors[f"base_model.model.{HEAD}.weight"] = tensors[f"base_model.model.{EMBEDDING}.weight"].clone()
        wanted.weights[HEAD] = wanted.weights[EMBEDDING]
    follows = case["is_tied"] and case["tokens"].get(HEAD) in (None, case["tokens"].get(EMBEDDING))
    for path, ids in case["tokens"].items():
        if not (path == HEAD and follows):
            values = tensor(f"{path}.{TOKENS}", len(ids), WIDTH)
            for each in (EMBEDDING, HEAD) if path == EMBEDDING and follows else (path,):
                wanted.weights[each] = wanted.weights[each].copy()
                wanted.weights[each][ids] = values
    if case["has_all_biases"]:
        wanted.biases[Q] = tensor(f"{Q}.base_layer.bias", WIDTH)
        for path in {V, NORM} - case["saved"]:
            wanted.biases[path] = tensor(f"{path}.bias", *weights.biases[path].shape)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj"],
        "bias": "all" if case["has_all_biases"] else "none",
        "modules_to_save": [path.rpartition(".")[2] for path in case["saved"]],
        "trainable_token_indices": {path.rpartition(".")[2]: ids for path, ids in case["tokens"].items()},
        "ensure_weight_tying": case["keeps_tied"],
    }
    return config, tensors, wanted


def in_the_end(adapter: CompiledAdapter, weights: RandomWeights) -> RandomWeights:
    """The weights and biases that the canonical form makes of the base's."""
    ended = RandomWeights(is_tied=False)
    ended.weights, ended.biases = {**weights.weights}, {**weights.biases}
    if adapter.tokens is not None:
        for path in (EMBEDDING, HEAD) if adapter.tokens.reach_head else (EMBEDDING,):
            ended.weights[path] = ended.weights[path].copy()
            ended.weights[path][adapter.tokens.token_ids] = adapter.tokens.values
    for update in adapter.updates:
        site = BASE.site(update.site)
        if update.out_scale is not None:
            ended.weights[update.site] = update.out_scale - np.float32(site.weight_offset)
        if update.delta is not None:
            ended.weights[update.site] = ended.weights[update.site] + update.delta
        if update.rows is not None:
            sum_of_rows = (update.rows.gain[:, None] * update.rows.b).T @ update.rows.a
            is_embedding = site.kind == "embedding"
            change = sum_of_rows.T / site.output_scale if is_embedding else sum_of_rows
            ended.weights[update.site] = np.asarray(ended.weights[update.site] + change, np.float32)
        if update.bias is not None:
            ended.biases[update.site] = ended.biases[update.site] + update.bias
    return ended


@settings(max_examples=200, deadline=None)
@given(companions())
def test_the_base_becomes_what_the_file_says(case: dict[str, Any]) -> None:
    layout, weights = replace(BASE, head_is_tied=case["is_tied"]), RandomWeights(case["is_tied"])
    config, tensors, wanted = uploaded(case, weights)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter_model.safetensors"
        save_file(tensors, file)
        checkpoint = read_checkpoint(json.dumps(config).encode(), file, layout, weights)
        adapter = checkpoint.compile(weights)
    ended = in_the_end(adapter, weights)
    for site in SITES:
        np.testing.assert_allclose(ended.weight(site.path), wanted.weight(site.path), atol=2e-6, err_msg=site.path)
    for path, bias in wanted.biases.items():
        np.testing.assert_allclose(ended.biases[path], bias, atol=1e-6, err_msg=path)
    assert checkpoint.combination == ("alone" if case["saved"] or case["tokens"] else "sum")
    has_delta = any(update.delta is not None for update in adapter.updates)
    assert checkpoint.is_dense == (has_delta or EMBEDDING in case["saved"])
    kept = [update.rows.a.size + update.rows.b.size for update in adapter.updates if update.rows is not None]
    kept += [update.delta.size for update in adapter.updates if update.delta is not None]
    kept += [VOCABULARY * WIDTH if EMBEDDING in case["saved"] else adapter.tokens.values.size] if adapter.tokens else []
    assert checkpoint.num_row_values == sum(kept)
