"""`heddle bench load`: which table is measured how."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from heddle_demo.bench.failure import BenchFailed
from heddle_demo.bench.load.bases import DEMO
from heddle_demo.bench.load.cold_table import measure_cold
from heddle_demo.bench.load.punica_table import measure_punica
from heddle_demo.bench.load.rounds import Say
from heddle_demo.bench.load.slora_table import measure_slora
from heddle_demo.bench.load.sweep_table import measure_sweep
from heddle_demo.bench.load.tables import TABLES
from heddle_demo.bench.shapes import SHAPES
from heddle_loadtest.errors import LoadTestError


class _Measure(Protocol):
    def __call__(
        self, base_name: str, out: Path, scratch: Path, say: Say, *, quick: bool
    ) -> Coroutine[Any, Any, None]: ...


MEASUREMENTS: dict[str, _Measure] = {
    "punica": measure_punica,
    "slora": measure_slora,
    "cold": measure_cold,
    "sweep": measure_sweep,
}


def run_load_bench(table: str, base: str, out: Path, say: Callable[[str], None], *, quick: bool) -> None:
    """Measures one table into out/TABLE-BASE and prints it. Raises BenchFailed."""
    if table not in MEASUREMENTS:
        raise BenchFailed(f"there is no table {table}; there are {', '.join(MEASUREMENTS)}.")
    if base not in (DEMO, *SHAPES):
        raise BenchFailed(f"--base knows {DEMO}, {', '.join(SHAPES)}, and not {base}.")
    folder = out / f"{table}-{base}"
    with tempfile.TemporaryDirectory(prefix="heddle-load-") as scratch:
        try:
            asyncio.run(MEASUREMENTS[table](base, folder, Path(scratch), say, quick=quick))
        except LoadTestError as error:
            raise BenchFailed(str(error)) from error
    print(TABLES[table](folder))
