"""What files of the LoRA family cannot be: each case spoils an honest upload and is refused with a reason."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.torch import save_file

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.canonical import CompiledAdapter, Floats
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from heddle_adapters.methods import adaptive_rank, low_rank

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q, V, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.input_layernorm"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
VOCABULARY, WIDTH, RANK = 10, 8, 2
BASE = BaseLayout(
    model_name="hand-made",
    fingerprint="sha256:right",
    quantization="none",
    sites=(
        Site(Q, "linear", WIDTH, WIDTH, has_bias=True),
        Site(V, "linear", WIDTH, 4, has_bias=False),
        Site(HEAD, "linear", WIDTH, VOCABULARY, has_bias=False),
        Site(NORM, "norm", WIDTH, WIDTH, has_bias=False),
        Site(EMBEDDING, "embedding", VOCABULARY, WIDTH, has_bias=False),
    ),
    embedding=EMBEDDING,
    head=HEAD,
    allows_dense=True,
)
TIED, QUANTIZED = replace(BASE, head_is_tied=True), replace(BASE, quantization="nf4")
A, B = "lora_A.weight", "lora_B.weight"
TOKENS = "token_adapter.trainable_tokens_delta"


class RandomWeights:
    """`source.BaseWeights` of the hand-made base; q_proj's weight is the unit matrix."""

    def weight(self, path: str) -> Floats:
        site = BASE.site(path)
        shapes = {"norm": (WIDTH,), "embedding": (VOCABULARY, WIDTH), "linear": (site.out_features, site.in_features)}
        if path == Q:
            return np.eye(WIDTH, dtype=np.float32)
        seed = BASE.index()[path]
        return np.random.default_rng(seed).standard_normal(shapes[site.kind]).astype(np.float32)

    def bias(self, path: str) -> Floats | None:
        return np.ones(WIDTH, np.float32) if path == Q else None


Upload = tuple[dict[str, Any], dict[str, Any]]  # config fields; tensors by "<module>.<part>"
Change = Callable[[dict[str, Any], dict[str, Any]], None]


def ones(*shape: int) -> Any:
    return torch.ones(shape)


def lora_upload() -> Upload:
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    return fields, {f"{Q}.{A}": ones(RANK, WIDTH), f"{Q}.{B}": ones(WIDTH, RANK)}


def adalora_upload() -> Upload:
    fields = {"peft_type": "ADALORA", "init_r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"]}
    tensors = {f"{Q}.lora_A": ones(RANK, WIDTH), f"{Q}.lora_B": ones(WIDTH, RANK), f"{Q}.lora_E": ones(RANK, 1)}
    return fields, tensors


def read(folder: Path, upload: Upload, base: BaseLayout = BASE, weights: Any = None) -> Checkpoint:
    fields, tensors = upload
    save_file({f"base_model.model.{name}": value for name, value in tensors.items()}, folder / WEIGHTS)
    return read_checkpoint(json.dumps(fields).encode(), folder / WEIGHTS, base, weights)


def compiled(folder: Path, upload: Upload, base: BaseLayout = BASE) -> CompiledAdapter:
    return read(folder, upload, base).compile(RandomWeights())


def change(
    base: BaseLayout = BASE, *, tensors: dict[str, Any] | None = None, without: tuple[str, ...] = (), **fields: Any
) -> tuple[BaseLayout, Change]:
    """Sets fields of the config and tensors of the file, and leaves one tensor out."""

    def apply(config: dict[str, Any], own: dict[str, Any]) -> None:
        own.update(tensors or {})
        config.update(fields)
        for name in without:
            del own[name]

    return base, apply


def embedding_tensors(rank: int = RANK) -> dict[str, Any]:
    return {
        f"{EMBEDDING}.lora_embedding_A": ones(rank, VOCABULARY),
        f"{EMBEDDING}.lora_embedding_B": ones(WIDTH, rank),
    }


MAGNITUDE = {f"{Q}.lora_magnitude_vector": ones(WIDTH)}
SAVED_EMBEDDING = {f"{EMBEDDING}.weight": ones(VOCABULARY, WIDTH)}
LEFT_OUT = {f"{V}.weight": ones(4, WIDTH)}
BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["q_proj"]}
ROWS = {f"{EMBEDDING}.{TOKENS}": ones(2, WIDTH)}

REFUSED: dict[str, tuple[tuple[BaseLayout, Change], str]] = {
    # options
    "Arrow": (change(arrow_config={"top_k": 1}), "mix them with fixed weights"),
    "unannounced sampler": (change(tensors={f"{Q}.lora_monteclora_sampler.std_prior": ones(2)}), "are not part of"),
    "fused experts": (change(target_parameters=["experts.gate_up_proj"]), "list linear layers in target_modules"),
    "replicated layers": (change(layer_replication=[[0, 2]]), "train on the base as it is served"),
    "QA-LoRA": (change(use_qalora=True), "averages the inputs over the groups of a GPTQ base"),
    "initialisation not a name": (change(init_lora_weights=["pissa"]), "init_lora_weights is"),
    "iterated PiSSA": (change(init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight_conversion"),
    "CorDA": (change(init_lora_weights="corda"), "init_lora_weights is 'corda'"),
    "LoRA-GA": (change(init_lora_weights="lora_ga"), "init_lora_weights is 'lora_ga'"),
    "LoftQ over an unnamed base": (change(init_lora_weights="loftq"), "heddle_base_fingerprint"),
    "DoRA and KaSA": (change(use_dora=True, kasa_config={}), "use_dora and kasa_config are set together"),
    "DoRA and PiSSA": (change(use_dora=True, init_lora_weights="pissa"), "are set together"),
    "DoRA and a bias": (change(use_dora=True, lora_bias=True), "lora_bias is true, which DoRA does not go with"),
    "DoRA not a flag": (change(use_dora="yes"), "use_dora must be true or false"),
    "unknown bias": (change(bias="boft_only"), "must be 'none', 'all' or 'lora_only'"),
    "OLoRA transposed": (change(init_lora_weights="olora", fan_in_fan_out=True), "fan_in_fan_out is true"),
    "KaSA transposed": (change(kasa_config={}, fan_in_fan_out=True), "train without KaSA"),
    # DoRA, KaSA, PiSSA
    "magnitude unannounced": (change(tensors=MAGNITUDE), "the config has use_dora false"),
    "magnitude missing": (change(use_dora=True), "but no lora_magnitude_vector"),
    "diagonal unannounced": (change(tensors={f"{Q}.lora_diag": ones(RANK)}), "the config has no kasa_config"),
    "diagonal missing": (change(kasa_config={}), "but no lora_diag"),
    "PiSSA over a quantised base": (change(QUANTIZED, init_lora_weights="pissa"), "quantised (nf4)"),
    "KaSA over a quantised base": (change(QUANTIZED, kasa_config={}), "quantised (nf4)"),
    "PiSSA of a tied head": (
        change(
            TIED,
            init_lora_weights="pissa",
            tensors={f"{HEAD}.{A}": ones(RANK, WIDTH), f"{HEAD}.{B}": ones(VOCABULARY, RANK)},
        ),
        "and with it the embedding",
    ),
    "PiSSA of a great rank": (
        change(init_lora_weights="pissa", r=9, tensors={f"{Q}.{A}": ones(9, 8), f"{Q}.{B}": ones(8, 9)}),
        "rank 9 is too large for PiSSA",
    ),
    "KaSA of the whole rank": (
        change(
            kasa_config={},
            r=8,
            tensors={f"{Q}.{A}": ones(8, 8), f"{Q}.{B}": ones(8, 8), f"{Q}.lora_diag": ones(8)},
        ),
        "rank 8 is too large for KaSA",
    ),
    "a rank bomb": (change(r=10**7, use_dora=True, tensors=MAGNITUDE), "rank 1e+07"),
    # BD-LoRA
    "blocks not an object": (change(use_bdlora=True), "use_bdlora must be an object"),
    "no blocks": (change(use_bdlora={**BLOCKS, "nblocks": 0}), "nblocks must be a whole number"),
    "unknown block option": (change(use_bdlora={**BLOCKS, "sharding": 2}), "'sharding'; unset them"),
    "blocks of both": (change(use_bdlora={**BLOCKS, "target_modules_bd_b": ["q_"]}), "both A and B"),
    "blocks that do not divide": (change(use_bdlora={**BLOCKS, "nblocks": 3}), "do not divide rank 2 and width 8"),
    "many blocks": (change(use_bdlora={**BLOCKS, "nblocks": 10**12}), "do not divide"),
    # aLoRA
    "aLoRA not a list": (change(alora_invocation_tokens="go"), "must be a list of at most 256 token ids"),
    "aLoRA too long": (change(alora_invocation_tokens=[1] * 257), "must be a list of at most 256 token ids"),
    "aLoRA of a negative token": (change(alora_invocation_tokens=[-1]), "must hold token ids, not '-1'"),
    "aLoRA of true": (change(alora_invocation_tokens=[True]), "must hold token ids, not 'True'"),
    "aLoRA and tokens": (
        change(alora_invocation_tokens=[1], trainable_token_indices=[1, 2], tensors=ROWS),
        "act on all of a prompt",
    ),
    "aLoRA and DoRA": (change(alora_invocation_tokens=[1], use_dora=True), "are set together"),
    # embeddings
    "B of the embedding missing": (
        change(tensors=embedding_tensors(), without=(f"{EMBEDDING}.lora_embedding_B",)),
        "but no lora_embedding_B",
    ),
    "rank of the embedding": (change(tensors=embedding_tensors(3)), "lora_embedding_A of model.embed_tokens has shape"),
    "DoRA of an embedding": (
        change(use_dora=True, tensors={**MAGNITUDE, **embedding_tensors()}),
        "DoRA is served on linear layers only",
    ),
    "aLoRA of an embedding": (
        change(alora_invocation_tokens=[1], tensors=embedding_tensors()),
        "on linear layers only",
    ),
    "a linear layer's LoRA on an embedding": (
        change(tensors={f"{EMBEDDING}.{A}": ones(RANK, VOCABULARY)}),
        "for model.embed_tokens, but no lora_embedding_A",
    ),
    "copy of another base layer": (
        change(tensors={f"{Q}.base_layer.weight": ones(WIDTH, WIDTH)}),
        "the base's own tensors cannot be uploaded",
    ),
    "embedding that nothing names": (change(tensors=SAVED_EMBEDDING), "are not part of a LoRA adapter"),
    # biases
    "bias missing": (change(bias="all"), f"lacks biases that bias of {CONFIG} promises: {Q}"),
    "bias of a target missing": (change(bias="lora_only"), "lacks biases"),
    "bias in place of an adapter": (
        change(
            bias="all",
            target_modules=["q_proj", "v_proj"],
            tensors={f"{V}.{A}": ones(RANK, WIDTH), f"{V}.{B}": ones(4, RANK), f"{Q}.bias": ones(WIDTH)},
            without=(f"{Q}.{A}", f"{Q}.{B}"),
        ),
        f"target_modules of {CONFIG} promises: {Q}",
    ),
    "bias unannounced": (change(tensors={f"{Q}.base_layer.bias": ones(WIDTH)}), "base's own tensors"),
    "bias of a target by the wrong name": (
        change(bias="all", tensors={f"{Q}.bias": ones(WIDTH)}),
        "no base_layer.bias",
    ),
    "bias of another module": (
        change(bias="lora_only", tensors={f"{Q}.base_layer.bias": ones(WIDTH), f"{V}.bias": ones(4)}),
        "v_proj.bias'",
    ),
    # whole modules
    "module missing": (change(modules_to_save=["norm"]), f"modules_to_save of {CONFIG} promises: {NORM}"),
    "head missing": (
        change(TIED, modules_to_save=["embed_tokens"], ensure_weight_tying=True, tensors=SAVED_EMBEDDING),
        "promises: lm_head",
    ),
    "modules as text": (change(modules_to_save="lm_head"), "list the module names"),
    "too many modules": (change(modules_to_save=["norm"] * 257), "at most 256 module names"),
    "module that is not named": (change(modules_to_save=["norm"], tensors={f"{NORM}.weight": ones(8), **LEFT_OUT}), V),
    "module without a weight": (
        change(modules_to_save=["norm"], tensors={f"{NORM}.bias": ones(WIDTH)}),
        "but no weight",
    ),
    "bias of a saved module missing": (
        change(
            modules_to_save=["self_attn"],
            tensors={f"{Q}.weight": ones(WIDTH, WIDTH), **LEFT_OUT},
        ),
        "but no bias",
    ),
    "transposed module": (
        change(modules_to_save=["v_proj"], fan_in_fan_out=True, tensors=LEFT_OUT),
        "stored transposed",
    ),
    "module of a full size": (
        change(replace(BASE, allows_dense=False), modules_to_save=["v_proj"], tensors=LEFT_OUT),
        "--allow-dense-adapters",
    ),
    "embedding in two ways": (
        change(modules_to_save=["embed_tokens"], tensors={**SAVED_EMBEDDING, **embedding_tensors()}),
        "in more than one way",
    ),
    # tokens
    "tokens not a list": (change(trainable_token_indices=3), "must be a list of token ids"),
    "no tokens of a module": (change(trainable_token_indices={"embed_tokens": []}), "must be a list of token ids"),
    "a fraction of a token": (change(trainable_token_indices=[1.5]), "must hold token ids"),
    "a token twice": (change(trainable_token_indices=[1, 1], tensors=ROWS), "names a token twice"),
    "too few tokens": (change(trainable_token_indices=[1], tensors=ROWS), "names 1 tokens"),
    "rows missing": (change(trainable_token_indices=[1, 2]), f"no {TOKENS} for 'model.embed_tokens'"),
    "rows unannounced": (change(tensors=ROWS), "are not part of a LoRA adapter"),
    "tokens and LoRA": (
        change(trainable_token_indices=[1, 2], tensors={**ROWS, **embedding_tensors()}),
        "in more than one way",
    ),
    "tokens and the whole tied head": (
        change(
            TIED,
            trainable_token_indices=[1, 2],
            modules_to_save=["lm_head"],
            tensors={**ROWS, f"{HEAD}.weight": ones(VOCABULARY, WIDTH)},
        ),
        "in more than one way",
    ),
    "tokens and the whole embedding": (
        change(trainable_token_indices=[1, 2], modules_to_save=["embed_tokens"], tensors={**ROWS, **SAVED_EMBEDDING}),
        "in more than one way",
    ),
}

INCOMPATIBLE: dict[str, tuple[tuple[BaseLayout, Change], str]] = {
    "LoftQ over another base": (
        change(init_lora_weights="loftq", heddle_base_fingerprint="sha256:wrong"),
        "heddle_base_fingerprint is 'sha256:wrong'",
    ),
    "aLoRA of an unknown token": (change(alora_invocation_tokens=[VOCABULARY]), "end at 9"),
    "unknown token": (change(trainable_token_indices=[1, VOCABULARY], tensors=ROWS), "names token 10"),
    "tokens of another module": (change(trainable_token_indices={"q_proj": [1]}), "does not name this base's token"),
    "tokens of an unknown module": (change(trainable_token_indices={"wte": [1]}), "does not name this base's token"),
    "magnitude of another width": (
        change(use_dora=True, tensors={f"{Q}.lora_magnitude_vector": ones(7)}),
        "must be [8] and is [7]",
    ),
    "A in full for blocks": (change(use_bdlora=BLOCKS), "lora_A.weight must be [2, 4] and is [2, 8]"),
    "another vocabulary": (
        change(
            tensors={f"{EMBEDDING}.lora_embedding_A": ones(RANK, 11), f"{EMBEDDING}.lora_embedding_B": ones(8, RANK)}
        ),
        "must be [2, 10] and is [2, 11]",
    ),
    "a classifier": (change(modules_to_save=["score"], tensors={"score.weight": ones(2, WIDTH)}), "'score'"),
    "bias that the base lacks": (
        change(bias="all", tensors={f"{Q}.base_layer.bias": ones(WIDTH), f"{V}.bias": ones(4)}),
        "that have none",
    ),
    "norm of another width": (change(modules_to_save=["norm"], tensors={f"{NORM}.weight": ones(9)}), "must be [8]"),
}


@pytest.mark.parametrize("case", [*REFUSED, *INCOMPATIBLE])
def test_refuses(case: str, tmp_path: Path) -> None:
    (base, spoil), message = (REFUSED | INCOMPATIBLE)[case]
    upload = lora_upload()
    read(tmp_path, upload)
    spoil(*upload)
    with pytest.raises(InvalidAdapter) as caught:
        read(tmp_path, upload, base)
    assert message in caught.value.message
    assert caught.value.param in (CONFIG, WEIGHTS)
    assert caught.value.message.endswith(".")
    assert isinstance(caught.value, AdapterIncompatible) == (case in INCOMPATIBLE)


ADALORA: dict[str, tuple[tuple[BaseLayout, Change], str]] = {
    "E missing": (change(without=(f"{Q}.lora_E",)), "but no lora_E"),
    "another rank": (change(init_r=3), "rank 3 (init_r, rank_pattern)"),
    "a rank bomb": (change(init_r=10**9), "rank 1000000000"),
    "pattern of numbers": (change(rank_pattern={f"{Q}.lora_E": 2}), "must be a list of true and false"),
    "pattern of ones": (change(rank_pattern={f"{Q}.lora_E": [1, 1]}), "must be a list of true and false"),
    "pattern a list": (change(rank_pattern=[True]), "must be an object"),
    "pattern of another rank": (change(rank_pattern={f"{Q}.lora_E": [True, False]}), "rank 1 (init_r"),
    "DoRA": (change(use_dora=True), "AdaLoRA does not go with"),
    "aLoRA": (change(alora_invocation_tokens=[1]), "AdaLoRA does not go with"),
    "huge scale": (change(lora_alpha=1e6), "at most 10000 is allowed"),
    "bias missing": (change(bias="all"), "lacks biases"),
    "a weight": (change(tensors={f"{Q}.{A}": ones(RANK, WIDTH)}), "are not part of a AdaLoRA adapter"),
}


@pytest.mark.parametrize("case", ADALORA)
def test_adalora_refuses(case: str, tmp_path: Path) -> None:
    (base, spoil), message = ADALORA[case]
    upload = adalora_upload()
    read(tmp_path, upload)
    spoil(*upload)
    with pytest.raises(InvalidAdapter) as caught:
        read(tmp_path, upload, base)
    assert message in caught.value.message


FIELDS = sorted(
    low_rank.READ_FIELDS
    | low_rank.HARMLESS_FIELDS
    | low_rank.REFUSED_FIELDS.keys()
    | adaptive_rank.READ_FIELDS
    | adaptive_rank.HARMLESS_FIELDS
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 12) | st.floats(-9, 9) | st.sampled_from(["", "all", "pissa", "q_"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["nblocks", "target_modules_bd_a", "embed_tokens", "q_proj", ""]), inner)
    ),
    max_leaves=5,
)
PARTS = [A, B, "lora_A", "lora_B", "lora_E", "lora_B.bias", "lora_diag", "lora_magnitude_vector", "lora_embedding_A"]
PARTS += ["lora_embedding_B", "base_layer.weight", "base_layer.bias", "weight", "bias", TOKENS]
MODULES = (Q, V, HEAD, NORM, EMBEDDING, "score", "")
SHAPES = st.lists(st.sampled_from([1, 2, 4, 8, 10]), max_size=3)


@settings(max_examples=300, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    tensors=st.dictionaries(st.tuples(st.sampled_from(MODULES), st.sampled_from(PARTS)), SHAPES, max_size=4),
    is_adaptive=st.booleans(),
    base=st.sampled_from([BASE, TIED, QUANTIZED]),
)
def test_whatever_is_uploaded_is_served_or_refused(
    fields: dict[str, Any], tensors: dict[tuple[str, str], list[int]], is_adaptive: bool, base: BaseLayout
) -> None:
    own_fields, own_tensors = adalora_upload() if is_adaptive else lora_upload()
    own_tensors |= {f"{module}.{part}": ones(*shape) for (module, part), shape in tensors.items()}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(InvalidAdapter):
        compiled(Path(folder), (own_fields | fields, own_tensors), base)


def test_loftq_over_the_named_base_is_plain(tmp_path: Path) -> None:
    fields, tensors = lora_upload()
    fields |= {"init_lora_weights": "loftq", "heddle_base_fingerprint": BASE.fingerprint}
    assert read(tmp_path, (fields, tensors)).method == "LoftQ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_of_the_base_must_be_one(dtype: Any, tmp_path: Path) -> None:
    upload = lora_upload()
    weights, name = RandomWeights(), f"{EMBEDDING}.base_layer.weight"
    copy = torch.from_numpy(weights.weight(EMBEDDING)).to(dtype)
    upload[1].update({**embedding_tensors(), name: copy})
    compiled(tmp_path, upload)
    read(tmp_path, upload, weights=weights)
    upload[1][name] = copy.clone()
    upload[1][name][3, 4] *= 1.01
    read(tmp_path, upload)
    for refused in (lambda: compiled(tmp_path, upload), lambda: read(tmp_path, upload, weights=weights)):
        with pytest.raises(InvalidAdapter, match="is not the weight of this server's base"):
            refused()


def test_tied_copies_must_be_equal(tmp_path: Path) -> None:
    fields, tensors = lora_upload()
    fields |= {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    tensors |= {**SAVED_EMBEDDING, f"{HEAD}.weight": ones(VOCABULARY, WIDTH)}
    assert compiled(tmp_path, (fields, tensors), TIED).tokens is not None
    tensors[f"{HEAD}.weight"] = 2 * ones(VOCABULARY, WIDTH)
    with pytest.raises(InvalidAdapter, match="differ, but ensure_weight_tying"):
        compiled(tmp_path, (fields, tensors), TIED)


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"kasa_config": {}}])
def test_parts_that_are_not_determined_are_not_guessed(options: dict[str, Any], tmp_path: Path) -> None:
    fields, tensors = lora_upload()
    tensors |= {f"{Q}.lora_diag": ones(RANK)} if "kasa_config" in options else {}
    with pytest.raises(InvalidAdapter, match="not determined by that weight"):
        compiled(tmp_path, (fields | options, tensors))


def test_weights_without_a_direction_have_no_magnitude(tmp_path: Path) -> None:
    fields, tensors = lora_upload()
    tensors |= {
        **MAGNITUDE,
        f"{Q}.{A}": -torch.eye(WIDTH)[:RANK] / 2,
        f"{Q}.{B}": torch.eye(WIDTH)[:, :RANK].contiguous(),
    }
    with pytest.raises(InvalidAdapter, match="are all zero with this adapter"):
        compiled(tmp_path, (fields | {"use_dora": True}, tensors))


def test_what_changes_the_answer_changes_the_identity(tmp_path: Path) -> None:
    fields, tensors = lora_upload()
    tensors |= ROWS
    changes: tuple[dict[str, Any], ...] = (
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": [2, 1]},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        {"trainable_token_indices": [1, 2], "init_lora_weights": "pissa"},
        {"trainable_token_indices": [1, 2], "init_lora_weights": "olora"},
    )
    digests = {read(tmp_path, (fields | each, tensors)).digest for each in changes}
    assert len(digests) == len(changes)
    harmless = {"trainable_token_indices": [1, 2], "init_lora_weights": "eva", "velora_config": {"scale": 2}}
    assert read(tmp_path, (fields | harmless, tensors)).digest in digests
    fields, tensors = lora_upload()
    one, other = ({"alora_invocation_tokens": ids} for ids in ([1, 2], [1, 3]))
    plain, first, second = (read(tmp_path, (fields | each, tensors)).digest for each in ({}, one, other))
    assert len({plain, first, second}) == 3
