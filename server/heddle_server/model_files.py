"""Where a model's files are: a local directory, or a hub id whose snapshot is fetched once."""

from __future__ import annotations

import re
from pathlib import Path

from heddle_server.config import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What a causal LM needs; not the same weights again in other formats.
_DESCRIPTION = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("*.safetensors",)


def find_model(model: str, with_weights: bool = True) -> Path:
    """The local directory of `model`; raises `ConfigError` with what was tried."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ConfigError(f"{model} is a directory without a config.json: not a transformers model.")
        return directory.resolve()
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(f"{model} is no directory, and cannot be a hub id such as Qwen/Qwen2.5-0.5B-Instruct.")
    return _fetch(model, (*_DESCRIPTION, *_WEIGHTS) if with_weights else _DESCRIPTION)


def model_name(model: str) -> str:
    """What a model is called when it is given no other name: its hub id, or its directory's name."""
    directory = Path(model).expanduser()
    return directory.resolve().name if directory.is_dir() else model


def _fetch(model: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except Exception as error:  # the hub, the network and the disk fail in many ways; all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{model} is no directory here, and the hub did not give it: {reason.rstrip('.')}. "
            "Pass a local model directory, or check the id and the network (HF_TOKEN for gated models)."
        ) from error
