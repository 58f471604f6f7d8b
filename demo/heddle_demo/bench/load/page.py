"""The measured tables in a Markdown page: found by their marks, written again from result folders.

    <!-- table punica from measurements/load/punica-demo -->
    ...
    <!-- end of table -->

The folder is relative to the page.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from heddle_demo.bench.failure import BenchFailed
from heddle_demo.bench.load.cell_numbers import KEPT_FILES
from heddle_demo.bench.load.tables import TABLES

_BLOCK = re.compile(
    r"(?P<mark><!-- table (?P<table>\w+) from (?P<folder>[\w./-]+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL
)


def rewrite_page(page: Path) -> str:
    """The page's text with every table made again. Raises BenchFailed for a table or a folder that is not there."""

    def write(block: re.Match[str]) -> str:
        folder = page.parent / block["folder"]
        if block["table"] not in TABLES:
            raise BenchFailed(f"{page} asks for a table {block['table']!r}; there are {', '.join(TABLES)}.")
        if not folder.is_dir():
            raise BenchFailed(f"{page} asks for a table from {folder}, which is not there.")
        return f"{block['mark']}\n{TABLES[block['table']](folder)}\n{block['end']}"

    return _BLOCK.sub(write, page.read_text())


def keep_results(results: Path, kept: Path) -> int:
    """Copies from every result folder below `results` what a page needs of it; how many folders there were."""
    folders = [summary.parent for summary in results.rglob("summary.json")]
    for folder in folders:
        target = kept / folder.relative_to(results)
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT_FILES:
            shutil.copyfile(folder / name, target / name)
    return len(folders)
