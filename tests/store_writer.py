"""A process that changes a store until it is killed, and the model that says what the store must hold then.

Run as a program it forks one writer for each line `<seed> <store folder>` that it reads, which spares the kills the
start of an interpreter. A writer says which change it begins and when the store has acknowledged it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_samples import BASE, config_bytes, lora_config, lora_tensors, write_weights
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import AdapterDetails, AdapterRecord
from heddle_adapters.tensor_file import WEIGHTS_FILE

NAMES = ("one", "two", "team/three")
ALIASES = ("prod", "test")
ALPHAS = range(1, 7)  # few, so that names share content and an upload may be what the name has
KEEP_VERSIONS = 3

Change = list[Any]  # ["put", name, alpha, alias or None, description or None] and so on


@dataclass
class ModelName:
    """What one name must mean; beside versions, aliases and description, the last number that it ever gave."""

    last: int = 0
    alphas: dict[int, int] = field(default_factory=dict)  # of the versions that exist
    aliases: dict[str, int] = field(default_factory=dict)
    description: str = ""


Model = dict[str, ModelName]


def after(model: Model, change: Change) -> Model:
    """What a store must hold after a change of what the model holds."""
    result = deepcopy(model)
    kind, name, *values = change
    state = result[name]
    if kind == "put":
        alpha, alias, description = values
        if not state.alphas or state.alphas[max(state.alphas)] != alpha:
            state.last += 1
            state.alphas[state.last] = alpha
        if alias:
            state.aliases[alias] = max(state.alphas)
        state.description = state.description if description is None else description
        newest = sorted(state.alphas)[-KEEP_VERSIONS:]
        kept = {*newest, *state.aliases.values()}
        state.alphas = {number: alpha for number, alpha in state.alphas.items() if number in kept}
    elif kind == "delete" or (kind == "delete version" and len(state.alphas) == 1):
        result[name] = ModelName(last=state.last)
    elif kind == "delete version":
        del state.alphas[values[0]]
    elif kind == "move alias":
        state.aliases[values[0]] = values[1]
    elif kind == "remove alias":
        del state.aliases[values[0]]
    else:
        state.description = values[0]
    return result


def make(store: AdapterStore, change: Change) -> None:
    """The same change to the store itself."""
    kind, name, *values = change
    if kind == "put":
        alpha, alias, description = values
        config = config_bytes(lora_config(lora_alpha=alpha))
        with store.upload_folder() as folder:
            weights = write_weights(folder / WEIGHTS_FILE, lora_tensors())
            details = AdapterDetails(alias=alias, description=description)
            store.put(name, read_checkpoint(config, weights, BASE), config, weights, details)
    elif kind == "delete":
        store.delete(name)
    elif kind == "delete version":
        store.delete(f"{name}@{values[0]}")
    elif kind == "move alias":
        store.set_alias(name, values[0], str(values[1]))
    elif kind == "remove alias":
        store.remove_alias(name, values[0])
    else:
        store.update(name, AdapterDetails(description=values[0]))


def random_change(store: AdapterStore, source: random.Random) -> Change:
    """Something that can be done to the store as it is; more often an upload than anything else."""
    changes: list[Change] = [
        ["put", name, source.choice(ALPHAS), source.choice((None, *ALIASES)), source.choice((None, "", "new"))]
        for name in NAMES
    ]
    for record in store.list():
        changes += _changes_of(record, source)
    return source.choice(changes)


def _changes_of(record: AdapterRecord, source: random.Random) -> list[Change]:
    name = record.name
    changes: list[Change] = [
        ["move alias", name, source.choice(ALIASES), source.choice(record.versions).version],
        ["describe", name, str(source.random())],
    ]
    changes += [["remove alias", name, alias] for alias in record.aliases][:1]
    deletable = [version.version for version in record.versions if not record.aliases_of(version)]
    changes += [["delete version", name, number] for number in deletable][:1]
    return [*changes, ["delete", name]] if source.random() < 0.3 else changes


def write_for_ever(path: Path, seed: int) -> None:
    source = random.Random(seed)
    say(f"writer {os.getpid()}")
    with AdapterStore(path, KEEP_VERSIONS) as store:
        for number in itertools.count():
            change = random_change(store, source)
            say(f"begin {json.dumps(change)}")
            make(store, change)
            say("done")
            if number % 3 == 0:
                store.collect()


def say(line: str) -> None:
    """One write of a short line, which reaches the pipe whole or not at all."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def main() -> None:
    assert "torch" not in sys.modules
    for line in sys.stdin:
        seed, path = line.split(maxsplit=1)
        child = os.fork()
        if child == 0:
            write_for_ever(Path(path.rstrip("\n")), int(seed))
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main()
