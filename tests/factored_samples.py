"""Real PEFT saves of every factored method, with random weights, and the canonical form's formula to hold them to."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import (
    DeftConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PeanutConfig,
    PeftModel,
    PveraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.canonical import CompiledAdapter, Floats, SiteUpdate
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from peft_samples import ModelWeights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMIT = 1e-5

# Of each kind: PEFT's config with a rank and target modules.
CONFIGS: dict[str, Callable[..., Any]] = {
    "deft": lambda r, **more: DeftConfig(r=r, alpha=3 * r, **more),
    "deft_qr": lambda r, **more: DeftConfig(r=r, decomposition_method="qr", **more),
    "delora": lambda r, **more: DeloraConfig(r=r, **more),
    "gralora": lambda r, **more: GraloraConfig(r=4 * r, gralora_k=4, alpha=6 * r, **more),
    "gralora_hybrid": lambda r, **more: GraloraConfig(r=2 * r, gralora_k=2, hybrid_r=r + 1, alpha=6 * r, **more),
    "hra": lambda r, **more: HRAConfig(r=r, **more),
    "hra_orthogonal": lambda r, **more: HRAConfig(r=r, apply_GS=True, **more),
    "loha": lambda r, **more: LoHaConfig(r=r, alpha=3 * r, **more),
    "lokr": lambda r, **more: LoKrConfig(r=r, alpha=3 * r, **more),
    "lokr_both": lambda r, **more: LoKrConfig(r=1 + r // 2, alpha=3 * r, decompose_both=True, **more),
    "lokr_uneven": lambda r, **more: LoKrConfig(r=r, alpha=3 * r, decompose_factor=2, **more),
    "lokr_whole": lambda r, **more: LoKrConfig(r=60 + r, alpha=30, **more),
    "miss": lambda r, **more: MissConfig(r=r, **more),
    "miss_bat": lambda r, **more: MissConfig(r=1 << r.bit_length() // 2, init_weights="bat", **more),
    "miss_mini": lambda r, **more: MissConfig(r=r, mini_r=8, init_weights="mini", **more),
    "para": lambda r, **more: DeftConfig(r=r, para=True, **more),
    "peanut": lambda r, **more: PeanutConfig(r=r, scaling=1.5, **more),
    "peanut_deep": lambda r, **more: PeanutConfig(r=r, depth=3, act_fn="silu", **more),
    "pvera": lambda r, **more: PveraConfig(r=r, **more),
    "pvera_drawn": lambda r, **more: PveraConfig(r=r, save_projection=False, projection_prng_key=r, **more),
    "tinylora": lambda r, **more: TinyLoraConfig(r=r, u=5, **more),
    "tinylora_tied": lambda r, **more: TinyLoraConfig(r=r, u=3, weight_tying=0.6, **more),
    "unilora": lambda r, **more: UniLoraConfig(r=r, theta_d_length=100, proj_seed=r, **more),
    "unilora_saved": lambda r, **more: UniLoraConfig(r=r, theta_d_length=100, save_indices=True, **more),
    "vblora": lambda r, **more: VBLoRAConfig(r=r, num_vectors=30, vector_length=16, topk=3, **more),
    "vblora_chosen": lambda r, **more: VBLoRAConfig(
        r=r, num_vectors=30, vector_length=16, topk=3, save_only_topk_weights=True, **more
    ),
    "vblora_large_bank": lambda r, **more: VBLoRAConfig(
        r=r, num_vectors=300, vector_length=8, save_only_topk_weights=True, **more
    ),
    "vera": lambda r, **more: VeraConfig(r=r, **more),
    "vera_drawn": lambda r, **more: VeraConfig(r=r, save_projection=False, projection_prng_key=r + 2**35, **more),
}

# Mean and deviation of parameters that would do too little otherwise.
SIZES = {"delora_lambda": (15, 3), "tinylora_v": (0, 3)}

# Those that PEFT also puts on GPT-2's layers, whose weights lie the other way round.
TRANSPOSABLE = frozenset(
    kind
    for kind in CONFIGS
    if kind.startswith(("deft", "gralora", "para", "pvera", "tinylora", "unilora", "vblora", "vera"))
)


def config_of(kind: str, rank: int, targets: Sequence[str], **more: Any) -> Any:
    """PEFT's config of one of `CONFIGS`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT would rather have projections saved
        return CONFIGS[kind](rank, target_modules=list(targets), task_type="CAUSAL_LM", **more)


def save_adapter(model: Any, config: Any, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Saves an adapter with large random weights of that type; returns what PEFT makes of the file, in float32."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of options that these methods warn about
        peft_model = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if parameter.requires_grad:
                    mean, deviation = next((sizes for part, sizes in SIZES.items() if part in name), (0, 0.4))
                    parameter.normal_(mean, deviation)
        peft_model.save_pretrained(folder)
        tensors = load_file(folder / WEIGHTS)
        rounded = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        widened = {name: value.float() if value.is_floating_point() else value for name, value in rounded.items()}
        save_file(widened, folder / WEIGHTS)  # PEFT reads some methods in float32 only
        reference = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    save_file(rounded, folder / WEIGHTS)
    return reference


def read_folder(folder: Path, base: BaseLayout) -> Checkpoint:
    return read_checkpoint(folder / CONFIG, folder / WEIGHTS, base)


def worst_error(compiled: CompiledAdapter, peft_model: Any, model: Any) -> tuple[float, float]:
    """Over all changed layers: the error of the canonical form, and the adapter's least effect, both over the limit."""
    generator = np.random.default_rng(0)
    errors, effects = list[float](), list[float]()
    for update in compiled.updates:
        layer, base_layer = peft_model.base_model.model.get_submodule(update.site), model.get_submodule(update.site)
        x = generator.standard_normal((5, _in_features(base_layer))).astype(np.float32)
        with torch.no_grad():
            expected = layer(torch.from_numpy(x.copy())).numpy()
            base = base_layer(torch.from_numpy(x)).numpy()
        limit = LIMIT * max(1, np.abs(expected).max())
        errors.append(float(np.abs(apply(update, model, x) - expected).max() / limit))
        effects.append(float(np.abs(expected - base).max() / limit))
    return max(errors), min(effects)


def apply(update: SiteUpdate, model: Any, x: Floats) -> Floats:
    """The canonical form's formula, word for word, over one layer of the base."""
    base = ModelWeights(model)
    out_scale = 1 if update.out_scale is None else update.out_scale
    y = out_scale * ((x if update.in_scale is None else update.in_scale * x) @ base.weight(update.site).T)
    b0, bias = base.bias(update.site), update.bias
    y = y + (out_scale if update.scales_base_bias else 1) * (0 if b0 is None else b0) + (0 if bias is None else bias)
    if update.rows is not None:
        y = y + (update.rows.gain * (x @ update.rows.a.T + update.rows.c)) @ update.rows.b
    if update.delta is not None:
        y = y + x @ update.delta.T
    return np.asarray(y, np.float32)


def _in_features(layer: Any) -> int:
    return int(layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1])
