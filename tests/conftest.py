"""Settings of the whole test session, and results as JSON for the long proofs."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: our kernels then run on the CPU
torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings


@pytest.fixture
def num_torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json-results", type=Path, help="write every test's outcome and seconds to this file")


class JsonResults:
    """Collects what `make soak` keeps."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tests: list[dict[str, object]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            result = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            self._tests.append({**result, **dict(report.user_properties)})  # what `record_property` was told

    def pytest_sessionfinish(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
        content = {
            "schema_version": 1,
            "ended_unix_seconds": int(time.time()),
            "machine": machine,
            "tests": self._tests,
        }
        self._file.write_text(json.dumps(content, indent=2) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--json-results")) is not None:
        config.pluginmanager.register(JsonResults(file))
