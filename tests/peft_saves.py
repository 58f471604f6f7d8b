"""Any PEFT config made into a random adapter on disk, with what PEFT itself computes beside it as the oracle."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file, save_file

from base_samples import full_layout_of
from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.canonical import Floats
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.tensor_file import WEIGHTS_FILE
from peft_samples import adapted, tiny_gpt2, tiny_llama, tiny_qwen2
from tolerances import LOGITS_FP32, MIN_EFFECT_FP32

MODELS: Mapping[str, Callable[[], Any]] = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}
STORAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def saved(
    model: Any, config: Any, folder: Path, *, seed: int = 0, std: float = 0.3, storage: torch.dtype = torch.float32
) -> Any:
    """Saves an adapter whose every trained number is random, and returns its PeftModel, over a copy of `model`.

    The numbers are exact in `storage`, as which the file holds them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # PEFT wraps norms all the same
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias", UserWarning)  # it adds one itself
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)  # of merging, elsewhere
        warnings.simplefilter("ignore", PeftWarning)
        torch.manual_seed(seed)
        peft_model = adapted(copy.deepcopy(model), config)
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn_like(parameter) * std
                    parameter.copy_((parameter + noise).to(storage))
        peft_model.save_pretrained(folder)
    edit_tensors(folder, lambda tensors: {name: tensor.to(storage) for name, tensor in tensors.items()})
    return peft_model


def read(folder: Path, model: Any, layout: BaseLayout | None = None) -> Checkpoint:
    """The saved adapter against the model's full layout."""
    return read_checkpoint(folder / CONFIG_FILE, folder / WEIGHTS_FILE, layout or full_layout_of(model))


def edit_config(folder: Path, **changes: Any) -> None:
    """Replaces fields of the saved config."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replaces the saved tensors with what `edit` makes of them."""
    path = folder / WEIGHTS_FILE
    save_file({name: tensor.clone().contiguous() for name, tensor in edit(load_file(path)).items()}, path)


def check_outputs(ours: Floats, expected: Any, base: Any) -> float:
    """Asserts that `ours` is what PEFT computed, and that this is far from what the base computes.

    Returns the largest error.
    """
    reference, own = expected.detach().numpy(), base.detach().numpy()
    limit = LOGITS_FP32 * max(1.0, float(np.abs(reference).max()))
    error = float(np.abs(ours - reference).max())
    assert error <= limit
    assert np.abs(reference - own).max() > MIN_EFFECT_FP32 * limit
    return error
