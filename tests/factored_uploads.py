"""Real saves of factored methods, changed before they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from base_samples import full_layout_of
from factored_samples import CONFIG, WEIGHTS, config_of, save_adapter
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from peft_samples import tiny_llama

Fields = dict[str, Any]
Tensors = dict[str, Any]
Change = Callable[[Fields, Tensors], None]

BASE = full_layout_of(tiny_llama())


@cache
def saved(kind: str) -> tuple[str, dict[str, Any]]:
    """The config's text and the tensors of a real save, at q and v."""
    with TemporaryDirectory() as folder:
        save_adapter(tiny_llama(), config_of(kind, 4, ("q_proj", "v_proj")), Path(folder))
        return (Path(folder) / CONFIG).read_text(), load_file(Path(folder) / WEIGHTS)


def read(kind: str, change: Change, folder: Path, base: BaseLayout = BASE) -> Checkpoint:
    text, tensors = saved(kind)
    fields, tensors = json.loads(text), dict(tensors)
    change(fields, tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / WEIGHTS)
    return read_checkpoint(json.dumps(fields).encode(), folder / WEIGHTS, base)


def config(**changes: Any) -> Change:
    return lambda fields, _: fields.update(changes)


def tensor(name: str, edit: Callable[[Any], Any]) -> Change:
    def change(_: Fields, tensors: Tensors) -> None:
        tensors[name] = edit(tensors.get(name))

    return change


def without(name: str) -> Change:
    def change(_: Fields, tensors: Tensors) -> None:
        del tensors[name]

    return change


def renamed(old: str, new: str) -> Change:
    def change(_: Fields, tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def both(first: Change, second: Change) -> Change:
    def change(fields: Fields, tensors: Tensors) -> None:
        first(fields, tensors)
        second(fields, tensors)

    return change


def extra(name: str, *shape: int) -> Change:
    return tensor(name, lambda _: np.ones(shape, np.float32))


def unchanged(fields: Fields, tensors: Tensors) -> None:
    pass
