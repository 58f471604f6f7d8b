"""Real PEFT saves of the methods whose change of a layer is as large as its weight, with all numbers random."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft.tuners.boft.layer
import torch
from peft import (
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    HiraConfig,
    OFTConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
)
from transformers.pytorch_utils import Conv1D

from base_samples import full_layout_of
from heddle_adapters.canonical import Floats, SiteUpdate
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from peft_samples import ModelWeights, adapted

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2_LINEARS = ("c_attn", "c_proj", "c_fc")

# By name: the config and the number around which trained values lie.
KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "shira": (ShiraConfig, {"r": 4}),
    "supertuning": (SupertuningConfig, {"sparsity": 0.9}),
    "supertuning_lora": (SupertuningConfig, {"sparsity": 0.95, "r": 3, "lora_alpha": 7.0}),
    "road_1": (RoadConfig, {"variant": "road_1", "group_size": 8}),
    "road_2": (RoadConfig, {"variant": "road_2", "group_size": 16}),
    "road_4": (RoadConfig, {"variant": "road_4", "group_size": 2}),
    "oft": (OFTConfig, {"oft_block_size": 8}),
    "oft_exact": (OFTConfig, {"oft_block_size": 16, "use_cayley_neumann": False}),
    "oft_number": (OFTConfig, {"r": 5, "oft_block_size": 0, "num_cayley_neumann_terms": 4}),
    "oft_adjusted": (OFTConfig, {"oft_block_size": 9, "num_cayley_neumann_terms": 7}),
    "oft_shared": (OFTConfig, {"oft_block_size": 8, "block_share": True, "num_cayley_neumann_terms": 2}),
    "oft_constrained": (OFTConfig, {"oft_block_size": 8, "coft": True, "eps": 2.0, "use_cayley_neumann": False}),
    "boft": (BOFTConfig, {"boft_block_size": 8}),
    "boft_number": (BOFTConfig, {"boft_block_size": 0, "boft_block_num": 4}),
    "boft_butterfly": (BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 3}),
    "fourierft": (FourierFTConfig, {"n_frequency": 300, "random_loc_seed": 12345, "scaling": 90.0}),
    "fourierft_pattern": (FourierFTConfig, {"n_frequency": 80, "n_frequency_pattern": {"k_proj": 200, "c_fc": 200}}),
    "c3a": (C3AConfig, {"block_size": 16}),
    "c3a_pattern": (C3AConfig, {"block_size": 8, "block_size_pattern": {"o_proj": 64}}),
    "hira": (HiraConfig, {"r": 5}),
    "hira_pattern": (HiraConfig, {"r": 3, "rank_pattern": {"layers.0.self_attn.q_proj": 6, "c_attn": 2}}),
}
GPT2_KINDS = ("fourierft", "fourierft_pattern", "hira", "hira_pattern")  # PEFT takes no Conv1D for the others
LABELS = {"shira": "SHiRA", "supertuning": "Super-Tuning", "road": "RoAd", "oft": "OFT", "boft": "BOFT"}
LABELS |= {"fourierft": "FourierFT", "c3a": "C3A", "hira": "HiRA"}


class TorchBlockDiagonal:
    """What PEFT's CUDA extension computes, without which there would be no BOFT of more than one factor."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*each) for each in blocks])]  # type: ignore[no-untyped-call]


peft.tuners.boft.layer._FBD_CUDA = TorchBlockDiagonal


def make_dense(
    model: Any, kind: str, folder: Path, seed: int = 0, targets: tuple[str, ...] = (), dtype: Any = None, **options: Any
) -> Any:
    """Saves a random adapter of one of `KINDS` into `folder`; its PeftModel, which wraps a copy of `model`."""
    make_config, defaults = KINDS[kind]
    is_gpt2 = model.config.model_type == "gpt2"
    settings = {**defaults, **options, "target_modules": [*(targets or (GPT2_LINEARS if is_gpt2 else LLAMA_LINEARS))]}
    torch.manual_seed(seed)
    config = make_config(task_type="CAUSAL_LM", **({"fan_in_fan_out": True} if is_gpt2 else {}), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # OFT adjusts a block size that does not divide a layer's width
        warnings.simplefilter("ignore", RuntimeWarning)  # a pattern's key that names a module of another architecture
        peft_model = adapted(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                mean = 1 if name.endswith(("road_alpha.default", "boft_s.default")) else 0
                spread = 1 if "c3a_" in name or "fourierft_" in name else 0.3
                parameter.normal_(mean, spread)
                if dtype is not None:
                    parameter.copy_(parameter.to(dtype))
    saved = peft_model if dtype is None else copy.deepcopy(peft_model)
    if dtype is not None:
        for parameter in saved.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    saved.save_pretrained(folder)
    return peft_model


def read_dense(model: Any, folder: Path) -> Checkpoint:
    return read_checkpoint(
        folder / "adapter_config.json", folder / "adapter_model.safetensors", full_layout_of(model, allows_dense=True)
    )


def apply(update: SiteUpdate, layer: Any, x: Floats) -> Floats:
    """The canonical form's formula over one layer of the base; x [tokens, in_features]."""
    weight = layer.weight.detach().numpy()
    weight = weight.T if isinstance(layer, Conv1D) else weight
    out_scale = np.float32(1) if update.out_scale is None else update.out_scale
    b0 = np.float32(0) if layer.bias is None else layer.bias.detach().numpy()
    y = out_scale * ((x if update.in_scale is None else update.in_scale * x) @ weight.T)
    y = y + (out_scale if update.scales_base_bias else 1) * b0 + (0 if update.bias is None else update.bias)
    if update.rows is not None:
        y = y + (update.rows.gain * (x @ update.rows.a.T)) @ update.rows.b
    return np.asarray(y if update.delta is None else y + x @ update.delta.T, np.float32)


def layer_errors(model: Any, peft_model: Any, checkpoint: Checkpoint, seed: int = 0) -> tuple[float, float]:
    """The largest error against PEFT's own layers, and the smallest effect on one, both as shares of the limit."""
    generator = np.random.default_rng(seed)
    errors, effects = [], []
    for update in checkpoint.compile(ModelWeights(model)).updates:
        layer = peft_model.base_model.model.get_submodule(update.site)
        base = model.get_submodule(update.site)
        width = ModelWeights(model).weight(update.site).shape[1]
        x = generator.standard_normal((5, width)).astype(np.float32)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch does not check SHiRA's sparse tensors
            expected = layer(torch.from_numpy(x)).numpy()
            plain = base(torch.from_numpy(x)).numpy()
        limit = 1e-5 * max(1, np.abs(expected).max())
        errors.append(np.abs(apply(update, base, x) - expected).max() / limit)
        effects.append(np.abs(expected - plain).max() / limit)
    return max(errors), min(effects)
