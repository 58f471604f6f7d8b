"""The page and the plots of a result folder, made of its files."""

from __future__ import annotations

from pathlib import Path

from heddle_loadtest.report.folder import PAGE, read_run
from heddle_loadtest.report.page import write_page
from heddle_loadtest.report.plots import write_plots


def write_report(path: Path) -> None:
    """report.html and the PNGs, of a run that is whole. Raises SpecError if it is not, OSError if they cannot be."""
    run = read_run(path)
    write_plots(run, path)
    write_page(run, path / PAGE)
