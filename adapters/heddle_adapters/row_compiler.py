"""The engine's end of the compile worker: which adapters are compiled, and in which order the others will be.

    <store>/rows/<32 hex digits>/<64 hex digits>.rows     the first: base, dtype, page size, compiler; then the digest

Rows files are a cache beside the content they were made from: any of them may be removed at any time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import msgspec

from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.canonical import Floats
from heddle_adapters.compile_worker import CompileJob, CompileResult, WorkerSpec, read_frame, write_frame
from heddle_adapters.digest import digest_hex
from heddle_adapters.errors import AdapterDamaged, AdapterError, AdapterIncompatible, InvalidAdapter, StoreUnusable
from heddle_adapters.packer import COMPILER_VERSION
from heddle_adapters.rows_file import UNFINISHED_SUFFIX

ROWS_SUFFIX = ".rows"
IDLE_SECONDS = 20.0  # that a worker without work is kept
MOST_SECONDS = 600.0  # that one adapter may take: folding it with the base of many layers is a minute or two
WORKER_COMMAND = (sys.executable, "-P", "-m", "heddle_adapters.compile_worker")  # -P: nothing from the current folder
ERRORS = {kind.__name__: kind for kind in (AdapterDamaged, AdapterIncompatible, InvalidAdapter, StoreUnusable)}


class Worker:
    """One compile worker process, used by one thread."""

    def __init__(self, spec: WorkerSpec) -> None:
        path = os.pathsep.join(folder for folder in sys.path if folder)  # it finds what this process found
        self._process = subprocess.Popen(
            WORKER_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},  # the other cores are the engine's
            start_new_session=True,  # Ctrl-C is for the server, which ends this process in order
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._jobs, self._results = self._process.stdin, self._process.stdout
        self._spec: WorkerSpec | None = spec

    def run(self, job: CompileJob) -> CompileResult | None:
        """The job's result, or None if the process died over it."""
        with suppress(BrokenPipeError):
            if self._spec is not None:
                write_frame(self._jobs, self._spec)
                self._spec = None
            write_frame(self._jobs, job)
        return read_frame(self._results, CompileResult)

    def kill(self) -> None:
        """Ends the process at once. The one method that other threads may call."""
        self._process.kill()

    def close(self) -> str:
        """Clears up after a process that is dead or about to be; how it ended, for people."""
        self._process.kill()
        status = self._process.wait()
        self._results.close()
        with suppress(BrokenPipeError):  # it may hold what the dead process did not read
            self._jobs.close()
        return f"signal {-status}" if status < 0 else f"exit status {status}"


class RowCompiler:
    """Compiles adapters in a worker process, one at a time: the urgent ones first, the others in between.

    The methods may be called from any thread and wait for nothing but a look at the folder.
    """

    def __init__(
        self, store_path: Path, layout: BaseLayout, row_dtype: str, page_bytes: int, base_bias: Mapping[str, Floats]
    ) -> None:
        """Removes rows files whose content is gone. The worker is started when there is work."""
        self._spec = WorkerSpec(
            store_path=str(store_path),
            layout=layout,
            row_dtype=row_dtype,
            page_bytes=page_bytes,
            base_bias={path: bias.astype("<f4").tobytes() for path, bias in base_bias.items()},
        )
        self._folder = store_path / "rows" / _key(self._spec)
        self._changed = threading.Condition()  # guards what follows
        self._urgent: dict[str, Future[None]] = {}  # by digest, in the order in which they were asked for
        self._background: dict[str, Future[None]] = {}
        self._running: dict[str, Future[None]] = {}  # at most one
        self._is_unwanted = False  # what is running: forgotten since it was begun
        self._worker: Worker | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._too_slow: set[str] = set()  # digests that took too long, and are not begun again
        _sweep(store_path)

    def rows_path(self, digest: str) -> Path:
        """Where this base's rows of that content lie, once they are compiled."""
        return self._folder / f"{digest_hex(digest)}{ROWS_SUFFIX}"

    def is_compiled(self, digest: str) -> bool:
        return self.rows_path(digest).exists()

    def compile(self, digest: str, urgent: bool) -> Future[None]:
        """Done when the rows file is there; everyone who asks for one digest gets the same future.

        It raises what `open_content` raises, or AdapterError where the worker failed; who asks again starts anew.
        """
        with self._changed:
            if urgent and (waiting := self._background.pop(digest, None)) is not None:
                self._urgent[digest] = waiting
            if digest in self._running:
                self._is_unwanted = False
            for jobs in (self._running, self._urgent, self._background):
                if digest in jobs:
                    return jobs[digest]
            future = Future[None]()
            future.set_running_or_notify_cancel()  # nobody may cancel what others wait for too
            if self.is_compiled(digest):
                future.set_result(None)
                return future
            if self._is_closed:
                future.set_exception(_stopping())
                return future
            (self._urgent if urgent else self._background)[digest] = future
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="row-compiler", daemon=True)
                self._thread.start()
            self._changed.notify()
            return future

    def forget(self, digest: str) -> None:
        """Remove its rows file, if there is one, and the one that is being made unless somebody asks for it again."""
        with self._changed:
            if digest in self._running:
                self._is_unwanted = True
            self.rows_path(digest).unlink(missing_ok=True)

    def close(self) -> None:
        """End the worker, whatever it is doing; what was asked for and is not done fails with AdapterError."""
        with self._changed:
            self._is_closed = True
            if self._worker is not None:
                self._worker.kill()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        for jobs in (self._urgent, self._background):
            while jobs:
                jobs.popitem()[1].set_exception(_stopping())

    def _work(self) -> None:
        """The compiler's thread: one job after another, until closed."""
        while (job := self._next()) is not None:
            digest, future = job
            outcome: Exception | None = None
            try:
                self._run(digest)
            except Exception as error:
                outcome = error
            with self._changed:
                del self._running[digest]
                if self._is_unwanted:
                    with suppress(OSError):  # the next start removes it
                        self.rows_path(digest).unlink(missing_ok=True)
                    self._is_unwanted = False
            if outcome is None:
                future.set_result(None)
            else:
                future.set_exception(outcome)
        self._dismiss_worker()

    def _next(self) -> tuple[str, Future[None]] | None:
        with self._changed:
            while not self._changed.wait_for(self._has_work, IDLE_SECONDS if self._worker else None):
                self._dismiss_worker()
            if self._is_closed:
                return None
            waiting = self._urgent or self._background
            digest = next(iter(waiting))
            self._running[digest] = waiting.pop(digest)
            return digest, self._running[digest]

    def _has_work(self) -> bool:
        return self._is_closed or bool(self._urgent or self._background)

    def _dismiss_worker(self) -> None:
        """Give its memory back; the next job starts another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _run(self, digest: str) -> None:
        try:
            worker = self._worker or self._start()
        except OSError as error:
            raise StoreUnusable(f"The compile worker cannot be started: {error.strerror}.", param="adapter") from error
        if digest in self._too_slow:
            raise InvalidAdapter(_too_slow_message(digest), param="adapter")
        deadline = threading.Timer(MOST_SECONDS, worker.kill)
        deadline.daemon = True
        started = time.monotonic()
        deadline.start()
        result = worker.run(CompileJob(digest, str(self.rows_path(digest))))
        deadline.cancel()
        if result is None and time.monotonic() - started >= MOST_SECONDS:
            self._worker = None
            worker.close()
            self._too_slow.add(digest)
            raise InvalidAdapter(_too_slow_message(digest), param="adapter")
        if result is None:
            self._worker = None
            message = f"The compile worker died over {digest} ({worker.close()}); ask again, or upload it anew."
            raise StoreUnusable(message, param="adapter")
        if result.error is not None:
            raise ERRORS.get(result.error, AdapterError)(result.message, param=result.param)

    def _start(self) -> Worker:
        worker = Worker(self._spec)
        with self._changed:
            self._worker = worker
            if self._is_closed:
                worker.kill()
        return worker


def _too_slow_message(digest: str) -> str:
    return (
        f"The adapter {digest} takes longer than {MOST_SECONDS:g} seconds to be compiled for this base; "
        "save it as plain low-rank matrices where it was trained."
    )


def _stopping() -> AdapterError:
    return StoreUnusable("The server is stopping; ask again when it is back.", param="adapter")


def _key(spec: WorkerSpec) -> str:
    """What rows depend on beside an adapter's content, as a folder's name."""
    parts = (spec.layout.fingerprint, spec.layout.sites, spec.row_dtype, spec.page_bytes, COMPILER_VERSION)
    return sha256(msgspec.msgpack.encode(parts)).hexdigest()[:32]


def _sweep(store_path: Path) -> None:
    """Removes rows of any base whose content is gone, and what a crash left unfinished."""
    for path in (store_path / "rows").glob("*/*"):
        is_orphan = path.suffix == ROWS_SUFFIX and not (store_path / "content" / path.stem).exists()
        if is_orphan or path.suffix == UNFINISHED_SUFFIX:
            path.unlink(missing_ok=True)
