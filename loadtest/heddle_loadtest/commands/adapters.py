"""`heddle-loadtest adapters`: a workload's adapters as PEFT folders. Holds no logic of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heddle_loadtest.errors import LoadTestError, SpecError

if TYPE_CHECKING:
    from heddle_loadtest.workload.spec import AdapterKind, Adapters, Workload


def adapters(
    spec: Annotated[str, typer.Argument(help="A workload: a YAML file, or the name of a ready-made one.")],
    base: Annotated[Path, typer.Option(help="The base model: a transformers folder, unquantised.")],
    out: Annotated[Path, typer.Option(help="Folder to write OUT/NAME/ to.")],
    variant: Annotated[str | None, typer.Option(help="One of the spec's variants.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE that differs, as adapters.count=100.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same weights.")] = 0,
    json_only: Annotated[bool, typer.Option("--json-only", help="Print the JSON line alone.")] = False,
) -> None:
    """Make the adapters that a workload asks for, with random weights, as PEFT would save them.

    How many there are and what they take is the last line on standard output, as JSON.
    """
    from heddle_loadtest.workload.spec_file import load_workload

    try:
        if seed < 0:
            raise SpecError("seed", seed, "is below 0", "Give 0 or more")
        workload = load_workload(spec, variant=variant, overrides=tuple(overrides or ()))
        typer.echo(json.dumps(_write(workload, base, out, seed, is_hidden=json_only)))
    except LoadTestError as error:
        name = f"--{error.field}" if error.field in ("base", "out", "seed", "variant") else error.field
        typer.echo(f"error: {error.describe(name)}", err=True)
        raise typer.Exit(2) from None


def _write(workload: Workload, base: Path, out: Path, seed: int, *, is_hidden: bool) -> dict[str, object]:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from heddle_loadtest.workload.adapter_files import write_adapter_files

    sets = _sets(workload)
    size_bytes = 0
    names: dict[str, None] = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=is_hidden) as progress:
        task = progress.add_task("adapters", total=sum(_num_adapters(each) for each in sets))

        def count(path: Path) -> None:
            nonlocal size_bytes
            names[path.name] = None
            size_bytes += sum(file.stat().st_size for file in path.iterdir())
            progress.advance(task)

        for each in sets:
            write_adapter_files(each, base, out, seed, on_written=count)
    return {"adapters": len(names), "size_bytes": size_bytes, "folder": str(out)}


def _sets(workload: Workload) -> list[Adapters]:
    """The workload's own adapters and its tenants', each set once."""
    sets = [workload.adapters, *(tenant.adapters for tenant in workload.tenants.values() if tenant.adapters)]
    wanted = [each for each in dict.fromkeys(sets) if each.listed or _num_adapters(each)]
    if not wanted:
        raise SpecError("adapters", None, "asks for none but the base", "Give `count` or `names` in the spec")
    _check_kinds(wanted)
    return wanted


def _check_kinds(sets: Sequence[Adapters]) -> None:
    """Raises SpecError if two sets mean different adapters by one name: one would be written over the other."""
    from heddle_loadtest.workload.adapter_set import adapter_names, kind_of

    kinds: dict[str, AdapterKind] = {}
    for each in sets:
        for index, name in enumerate(() if each.listed else adapter_names(each)):
            if kinds.setdefault(name, kind_of(each, index)) != kind_of(each, index):
                problem = "is of two kinds, in two of the workload's sets of adapters"
                raise SpecError("adapters.name", name, problem, "Give each set a pattern of its own")


def _num_adapters(adapters: Adapters) -> int:
    from heddle_loadtest.workload.names import BASE

    return adapters.count or sum(name != BASE for name in adapters.names)
