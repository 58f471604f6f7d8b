"""The fake server in a process of its own, for as long as a `with` block runs. Knows no schedule."""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType
from typing import Self

import msgspec

from heddle_loadtest.mock.server import READY
from heddle_loadtest.mock.settings import MockSettings

_STOP_SECONDS = 10.0


class MockProcess:
    """`url` is where it listens. Its own process, so that it never waits for the interpreter of its client.

    It ends with its standard input too, and so does not outlive a parent that is killed.
    """

    def __init__(self, settings: MockSettings) -> None:
        self.url = ""
        self._settings = settings
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "heddle_loadtest.mock.server", msgspec.json.encode(self._settings).decode()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(READY):
            self._end()
            raise RuntimeError(f"the mock did not start: it said {line!r} and ended")
        self.url = line.removeprefix(READY).strip()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
