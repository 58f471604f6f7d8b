"""The LoRA family: what PEFT saves compiles to what PEFT computes when it loads the same file."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from base_samples import full_layout_of
from canonical_model import random_input, with_adapter
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.positions import Positions
from peft_samples import ModelWeights, adapted, tiny_gpt2, tiny_llama, tiny_qwen2
from tiny_models import make_tiny_model
from tolerances import LOGITS_FP32, MIN_EFFECT_FP32

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODELS: dict[str, Callable[[], Any]] = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}
LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
EMBEDDING = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt2": "wte"}


def tied_llama() -> Any:
    llama = tiny_llama()
    llama.config.tie_word_embeddings = True
    llama.tie_weights()
    return llama


MODELS["tied llama"] = tied_llama
LINEAR["tied llama"], EMBEDDING["tied llama"] = LINEAR["llama"], "embed_tokens"


def save_adapter(model: Any, folder: Path, config: Any, seed: int = 0, **options: Any) -> None:
    """A random adapter of a copy of the model, all its trained numbers far from where they began."""
    torch.manual_seed(seed)
    peft_model = quietly(lambda: get_peft_model(copy.deepcopy(model), config))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora_" in name and "ranknum" not in name:
                parameter.normal_(0, 0.2)
            elif parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    quietly(lambda: peft_model.save_pretrained(folder, **options))


def loaded_by_peft(model: Any, folder: Path) -> Any:
    return quietly(lambda: PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval())


def quietly(act: Callable[[], Any]) -> Any:
    """PEFT warns of much that is meant: tied weights, rank patterns, biases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return act()


def check_parity(
    model: Any, folder: Path, layout: BaseLayout | None = None, limit: float = LOGITS_FP32
) -> tuple[Checkpoint, float]:
    """Every changed module and the logits, against PEFT's own; answers with the largest relative error."""
    layout = layout or full_layout_of(model)
    weights = ModelWeights(model)
    checkpoint = read_checkpoint(folder / CONFIG, folder / WEIGHTS, layout, weights)
    compiled = checkpoint.compile(weights)
    ours, theirs = with_adapter(model, layout, compiled), loaded_by_peft(model, folder)
    sites = {site.path: site for site in layout.sites}
    assert {update.site for update in compiled.updates} | ({layout.embedding} if compiled.tokens else set()) == {
        *checkpoint.sites
    }
    errors = []
    with torch.no_grad():
        for path in checkpoint.sites:
            x = random_input(sites[path])
            expected = theirs.base_model.model.get_submodule(path)(x)
            bound = max(1.0, float(expected.abs().max()))
            errors.append(float((ours.get_submodule(path)(x) - expected).abs().max()) / bound)
            effect = float((model.get_submodule(path)(x) - expected).abs().max())
            assert effect > MIN_EFFECT_FP32 * limit * bound, path
        ids = torch.arange(2, 42)[None] % layout.vocabulary_size
        logits = theirs(ids).logits
        bound = max(1.0, float(logits.abs().max()))
        errors.append(float((ours(ids).logits - logits).abs().max()) / bound)
        assert float((model(ids).logits - logits).abs().max()) > MIN_EFFECT_FP32 * limit * bound
    assert max(errors) <= limit
    return checkpoint, max(errors)


def lora(name: str, **options: Any) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 12, "target_modules": LINEAR[name], "fan_in_fan_out": name == "gpt2"}
    return LoraConfig(task_type="CAUSAL_LM", **{**defaults, **options})


def adalora(name: str, **options: Any) -> AdaLoraConfig:
    defaults = {"init_r": 5, "target_r": 2, "lora_alpha": 12, "total_step": 10, "target_modules": LINEAR[name]}
    return AdaLoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2", **{**defaults, **options})


BLOCKS_A, BLOCKS_B = ["o_proj", "down_proj", "c_proj"], ["q_proj", "k_proj", "v_proj", "gate", "up_", "c_attn", "c_fc"]
BLOCKS = BdLoraConfig(target_modules_bd_a=BLOCKS_A, target_modules_bd_b=BLOCKS_B, nblocks=2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LoRA", {}),
    "rank stabilised": ("rsLoRA", {"use_rslora": True}),
    "DoRA": ("DoRA", {"use_dora": True}),
    "rank stabilised DoRA": ("DoRA", {"use_dora": True, "use_rslora": True}),
    "PiSSA": ("PiSSA", {"init_lora_weights": "pissa", "lora_alpha": 4}),
    "rank stabilised PiSSA": ("PiSSA", {"init_lora_weights": "pissa", "use_rslora": True, "lora_alpha": 2}),
    "OLoRA": ("OLoRA", {"init_lora_weights": "olora", "lora_alpha": 4}),
    "KaSA": ("KaSA", {"kasa_config": KasaConfig()}),
    "MiCA": ("LoRA", {"init_lora_weights": "mica"}),
    "Gaussian": ("LoRA", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("LoRA", {"init_lora_weights": "orthogonal"}),
    "VeLoRA": ("LoRA", {"velora_config": VeloraConfig()}),
    "MonteCLoRA": ("LoRA", {"monteclora_config": MontecloraConfig(num_samples=3)}),
    "KaSA with a bias": ("KaSA", {"kasa_config": KasaConfig(), "lora_bias": True}),
    "BD-LoRA": ("BD-LoRA", {"use_bdlora": BLOCKS}),
    "all biases": ("LoRA", {"bias": "all"}),
    "biases of targets": ("LoRA", {"bias": "lora_only"}),
    "DoRA with all biases": ("DoRA", {"use_dora": True, "bias": "all"}),
    "own and base biases": ("LoRA", {"bias": "all", "lora_bias": True}),
}
NOT_OF_GPT2 = {"BD-LoRA", "KaSA", "KaSA with a bias", "OLoRA"}  # PEFT breaks on its layers, or refuses them


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_variants_on_all_linear_layers(name: str, case: str, tmp_path: Path) -> None:
    if name == "gpt2" and case in NOT_OF_GPT2:
        pytest.skip("PEFT has none")
    label, options = CASES[case]
    model = MODELS[name]()
    save_adapter(model, tmp_path, lora(name, **options))
    checkpoint, _ = check_parity(model, tmp_path)
    assert checkpoint.method == label
    assert checkpoint.combination == ("alone" if label == "DoRA" else "sum")


@pytest.mark.parametrize("name", MODELS)
def test_head_and_embedding(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    save_adapter(model, tmp_path, lora(name, target_modules=[LINEAR[name][0], "lm_head", EMBEDDING[name]]))
    checkpoint, _ = check_parity(model, tmp_path)
    layout = full_layout_of(model)
    assert {layout.embedding, layout.head} < {*checkpoint.sites}
    assert checkpoint.combination == "sum"


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_side_of_a_tied_pair_leaves_the_other_alone(target: str, tmp_path: Path) -> None:
    model = tied_llama()
    save_adapter(model, tmp_path, lora("llama", target_modules=[target]))
    checkpoint, _ = check_parity(model, tmp_path)
    assert [path.rpartition(".")[2] for path in checkpoint.sites] == [target]


def test_head_of_dora(tmp_path: Path) -> None:
    model = tied_llama()
    save_adapter(model, tmp_path, lora("llama", target_modules=["lm_head"], use_dora=True))
    check_parity(model, tmp_path)


def test_tied_targets(tmp_path: Path) -> None:
    model = tied_llama()
    save_adapter(model, tmp_path, lora("llama", target_modules=["embed_tokens"], ensure_weight_tying=True))
    checkpoint, _ = check_parity(model, tmp_path)
    assert len(checkpoint.sites) == 2


SAVED: dict[str, dict[str, Any]] = {
    "norms": {"modules_to_save": ["norm"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head, tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "a block": {"modules_to_save": ["1.mlp"]},
    "LongLoRA": {"modules_to_save": ["embed_tokens", "norm"]},
    "tokens": {"trainable_token_indices": [90, 3, 17]},
    "tokens of the embedding": {"trainable_token_indices": {"embed_tokens": [5, 100]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [5, 100]}},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [5, 100], "lm_head": [5, 100]}},
    "tokens beside the head's LoRA": {"trainable_token_indices": [5, 100], "target_modules": ["q_proj", "lm_head"]},
    "other tokens of both": {"trainable_token_indices": {"embed_tokens": [5, 100], "lm_head": [100, 6]}},
}


@pytest.mark.parametrize("name", ["llama", "tied llama"])
@pytest.mark.parametrize("case", SAVED)
def test_what_is_saved_beside_lora(name: str, case: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    save_adapter(model, tmp_path, lora(name, **{"target_modules": ["q_proj"], **SAVED[case]}))
    checkpoint, _ = check_parity(model, tmp_path)
    assert checkpoint.combination == "alone"
    assert checkpoint.is_dense == ("modules_to_save" in SAVED[case] and case != "norms")
    tokens = checkpoint.compile(ModelWeights(model)).tokens
    is_tied_case = case in ("both, tied", "head, tied", "tokens", "tokens of the embedding", "tokens of both")
    is_tied_case = is_tied_case or "beside" in case
    if tokens is not None:
        assert tokens.reach_head == (name == "tied llama" and is_tied_case)


def test_only_changed_rows_of_a_saved_embedding_are_kept(tmp_path: Path) -> None:
    model = tiny_llama()
    config = lora("llama", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft_model = adapted(copy.deepcopy(model), config)
    with torch.no_grad():
        peft_model.base_model.model.model.embed_tokens.modules_to_save["default"].weight[[4, 90]] += 0.5
    peft_model.save_pretrained(tmp_path)
    weights = ModelWeights(model)
    tokens = read_checkpoint(tmp_path / CONFIG, tmp_path / WEIGHTS, full_layout_of(model)).compile(weights).tokens
    assert tokens is not None
    np.testing.assert_array_equal(tokens.token_ids, [4, 90])
    np.testing.assert_array_equal(tokens.values, weights.weight("model.embed_tokens")[[4, 90]] + np.float32(0.5))


@pytest.mark.parametrize("case", [{"modules_to_save": ["ln_1", "ln_f"]}, {"trainable_token_indices": [3, 90]}])
def test_what_is_saved_beside_lora_on_gpt2(case: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_gpt2()
    save_adapter(model, tmp_path, lora("gpt2", **case))
    check_parity(model, tmp_path)


def test_gemma_offsets_its_norms_and_scales_its_embedding(tmp_path: Path) -> None:
    model = make_tiny_model("gemma2")
    layout = gemma_layout(model)
    for options in (
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 90]},
    ):
        save_adapter(model, tmp_path, lora("llama", **options))
        check_parity(model, tmp_path, layout)


def gemma_layout(model: Any) -> BaseLayout:
    layout = full_layout_of(model)
    scale = model.config.hidden_size**0.5
    changes = {"norm": {"weight_offset": 1.0}, "embedding": {"output_scale": scale}}
    sites = tuple(replace(site, **changes.get(site.kind, {})) for site in layout.sites)
    return replace(layout, sites=sites)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"lora_alpha": -1}, {"bias": "all"}, {"bias": "lora_only"}])
def test_adalora(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = MODELS[name]()
    save_adapter(model, tmp_path, adalora(name, **options))
    checkpoint, _ = check_parity(model, tmp_path)
    assert (checkpoint.method, checkpoint.max_rank) == ("AdaLoRA", 5)


def test_pruned_adalora(tmp_path: Path) -> None:
    model = tiny_llama()
    config = adalora("llama")
    pattern = {
        f"model.layers.{layer}.self_attn.{module}.lora_E": [(layer + i) % 2 == 0 for i in range(5)]
        for layer in range(2)
        for module in ("q_proj", "v_proj")
    }
    config.rank_pattern = pattern
    config.target_modules = {"q_proj", "v_proj", "down_proj"}
    save_adapter(model, tmp_path, config)
    checkpoint, _ = check_parity(model, tmp_path)
    ranks = {update.site: update.num_rows for update in checkpoint.compile(ModelWeights(model)).updates}
    assert ranks["model.layers.0.self_attn.q_proj"] == 3
    assert ranks["model.layers.1.self_attn.q_proj"] == 2
    assert ranks["model.layers.1.mlp.down_proj"] == 5


def test_a_converted_save_is_plain(tmp_path: Path) -> None:
    """What save_pretrained makes of a PiSSA, given the adapter as it was first: A and B of both, side by side."""
    model = tiny_llama()
    torch.manual_seed(0)
    peft_model = adapted(copy.deepcopy(model), lora("llama", init_lora_weights="pissa"))
    peft_model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft_model.save_pretrained(tmp_path / "unconverted")
    first = {"path_initial_model_for_weight_conversion": str(tmp_path / "first")}
    quietly(lambda: peft_model.save_pretrained(tmp_path / "converted", **first))
    converted, _ = check_parity(model, tmp_path / "converted")
    unconverted, _ = check_parity(model, tmp_path / "unconverted")
    assert (converted.method, converted.max_rank) == ("LoRA", 8)
    assert (unconverted.method, unconverted.max_rank) == ("PiSSA", 8)


def test_alora_says_where_it_begins(tmp_path: Path) -> None:
    model = tiny_llama()
    save_adapter(model, tmp_path, lora("llama", alora_invocation_tokens=[7, 8, 7]))
    checkpoint = read_checkpoint(tmp_path / CONFIG, tmp_path / WEIGHTS, full_layout_of(model))
    assert (checkpoint.method, checkpoint.combination) == ("aLoRA", "alone")
    assert checkpoint.positions == Positions(invocation=(7, 8, 7))
