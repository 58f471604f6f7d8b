"""The command lines of the servers that take turns under one load. Starts none of them."""

from __future__ import annotations

import sys
from pathlib import Path

from heddle_demo.bench.load.bases import LoadBase

HEDDLE = "heddle"
GIVES_WAY = ("nice", "-n", "5")  # to the client, which shares the cores and would be late otherwise; all alike
BASELINES = ("peft-mixed", "peft-grouped", "transformers-cb-grouped")


def heddle_command(base: LoadBase, adapters: Path, store: Path, **options: object) -> list[str]:
    """`options` as `heddle serve` takes them, underscores for dashes."""
    chosen = {"adapters": adapters, "store": store, "port": 0, **options}
    return _command("heddle_server", "serve", str(base.path), options=chosen)


def baseline_command(kind: str, base: LoadBase, adapters: Path) -> list[str]:
    """One of `BASELINES`."""
    return _command("heddle_loadtest", "baseline", kind, str(base.path), options={"adapters": adapters, "port": 0})


def _command(module: str, *arguments: str, options: dict[str, object]) -> list[str]:
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*GIVES_WAY, sys.executable, "-m", module, *arguments, *words]
