"""The process that turns stored adapters into rows files, at low priority, so that no step waits for a fold.

`python -m heddle_adapters.compile_worker` is started by `row_compiler`. On stdin it reads a WorkerSpec, then one
CompileJob after another; on stdout it answers each with a CompileResult. A frame is its length in 4 bytes,
little-endian, and that many bytes of msgpack. It ends when stdin does, and so with the engine, however that went.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

import msgspec
import numpy as np

from heddle_adapters.base_file import LazyBase, base_file_path
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.content_folder import open_content
from heddle_adapters.errors import AdapterError, StoreUnusable
from heddle_adapters.packer import Packer
from heddle_adapters.rows_file import write_rows

LENGTH_BYTES = 4
NICENESS = 10

Message = TypeVar("Message", bound=msgspec.Struct)


class WorkerSpec(msgspec.Struct, frozen=True):
    """What all jobs of one worker share."""

    store_path: str
    layout: BaseLayout
    row_dtype: str  # a key of packer.ROW_ENCODINGS
    page_bytes: int
    base_bias: dict[str, bytes]  # float32 [out_features] of the sites that have one


class CompileJob(msgspec.Struct, frozen=True):
    """One content to compile, and where its rows file belongs."""

    digest: str
    rows_path: str


class CompileResult(msgspec.Struct, frozen=True):
    """How a job went: nothing, or the error that it ended with."""

    error: str | None = None  # the name of its class in heddle_adapters.errors
    message: str = ""
    param: str | None = None


def write_frame(file: IO[bytes], message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    file.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
    file.flush()


def read_frame(file: IO[bytes], kind: type[Message]) -> Message | None:
    """The next message; None where the other end has closed or died."""
    num_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
    data = file.read(num_bytes)
    return msgspec.msgpack.decode(data, type=kind) if data and len(data) == num_bytes else None


class Compiler:
    """Does the jobs of one spec."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._store_path = Path(spec.store_path)
        self._layout = spec.layout
        base_bias = {path: np.frombuffer(data, np.float32) for path, data in spec.base_bias.items()}
        self._packer = Packer(spec.layout, spec.row_dtype, spec.page_bytes, base_bias)
        self._base = LazyBase(base_file_path(self._store_path, spec.layout.fingerprint, spec.row_dtype))

    def run(self, job: CompileJob) -> CompileResult:
        try:
            checkpoint = open_content(self._store_path, job.digest, self._layout)
            write_rows(Path(job.rows_path), self._packer.pack(checkpoint.compile(self._base)))
        except AdapterError as error:
            return CompileResult(type(error).__name__, error.message, error.param)
        except Exception as error:  # one adapter's trouble is not the next one's
            traceback.print_exc()
            kind, reason = (StoreUnusable, error.strerror) if isinstance(error, OSError) else (AdapterError, None)
            # What else an error says may name paths.
            message = f"The adapter {job.digest} could not be compiled: {reason or 'the server log has the details'}."
            return CompileResult(kind.__name__, message, "adapter")
        return CompileResult()


def main() -> None:
    os.nice(NICENESS)
    jobs = sys.stdin.buffer
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints must not end up among the results
    if (spec := read_frame(jobs, WorkerSpec)) is None:
        return
    compiler = Compiler(spec)
    with suppress(BrokenPipeError):  # the engine died while this job ran
        while (job := read_frame(jobs, CompileJob)) is not None:
            write_frame(results, compiler.run(job))


if __name__ == "__main__":
    main()
