"""The compile worker, as the real process that it is: what it makes, its order, its errors and its deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from adapter_samples import BASE, NoBase, Q, V, config_bytes, lora_config, lora_tensors, tensor_name, write_weights
from heddle_adapters import row_compiler
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.compile_worker import NICENESS, CompileJob, CompileResult, WorkerSpec, read_frame, write_frame
from heddle_adapters.content_folder import ContentFolder, content_paths
from heddle_adapters.errors import AdapterDamaged, AdapterError, AdapterIncompatible, InvalidAdapter
from heddle_adapters.packer import Packer
from heddle_adapters.row_compiler import RowCompiler
from heddle_adapters.rows_file import read_rows
from heddle_adapters.tensor_file import WEIGHTS_FILE

PAGE_BYTES = 128
BASE_BIAS = {V: np.arange(4, dtype=np.float32)}
SECONDS = 20.0  # that a loaded machine may take for anything here


OF_OTHERS: set[int] = set()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def compiler(store: Path) -> Iterator[RowCompiler]:
    compiler = make_compiler(store)
    yield compiler
    compiler.close()


def make_compiler(store: Path, row_dtype: str = "bfloat16") -> RowCompiler:
    return RowCompiler(store, BASE, row_dtype, PAGE_BYTES, BASE_BIAS)


def add(store: Path, tensors: dict[str, Any], config: dict[str, Any]) -> str:
    """Stores an adapter as the server does; its digest."""
    folder = ContentFolder(store)
    with folder.upload_folder() as upload:
        weights = write_weights(upload / WEIGHTS_FILE, tensors)
        digest = read_checkpoint(config_bytes(config), weights, BASE).digest
        folder.add(digest, config_bytes(config), weights)
    return digest


def add_rows(store: Path, seed: int = 0) -> str:
    return add(store, lora_tensors(seed), lora_config())


def add_scales(store: Path) -> str:
    """Scales the output of a site whose base has a bias."""
    tensors = {tensor_name(V, "ia3_l"): np.array([[2.0], [3.0], [4.0], [5.0]], np.float32)}
    config = {"peft_type": "IA3", "target_modules": ["v_proj"], "feedforward_modules": []}
    return add(store, tensors, config)


@pytest.fixture(autouse=True)
def workers_of_others() -> Iterator[None]:
    """Engines of other tests may still have theirs."""
    OF_OTHERS.update(worker_pids())
    yield
    OF_OTHERS.clear()


def worker_pids() -> list[int]:
    """Compile workers that this test has started."""
    children: set[int] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(OSError):  # threads come and go
            children.update(map(int, (task / "children").read_text().split()))
    return [pid for pid in children - OF_OTHERS if b"heddle_adapters.compile_worker" in command_line(pid)]


def command_line(pid: int) -> bytes:
    """Nothing if the process is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def worker_pid(compiler: RowCompiler, store: Path) -> int:
    """The worker, idle: started by a job that is done."""
    compiler.compile(add_rows(store, seed=999), urgent=True).result(SECONDS)
    (pid,) = worker_pids()
    return pid


def test_makes_what_the_packer_makes(compiler: RowCompiler, store: Path) -> None:
    packer = Packer(BASE, "bfloat16", PAGE_BYTES, BASE_BIAS)
    for digest in (add_rows(store), add_scales(store)):
        assert not compiler.is_compiled(digest)
        compiler.compile(digest, urgent=True).result(SECONDS)
        assert compiler.is_compiled(digest)
        expected = packer.pack(read_checkpoint(*content_paths(store, digest), BASE).compile(NoBase()))
        actual = read_rows(compiler.rows_path(digest), digest)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(actual, name), value, err_msg=name)
    begin = int(actual.bias[0])
    bias = actual.pages.reshape(-1)[begin : begin + 16].view(np.float32)
    np.testing.assert_array_equal(bias, [0, 2, 6, 12], err_msg="(l - 1) * b0 with the base's bias from the spec")


def test_errors_come_back_as_what_they_are(store: Path) -> None:
    other_base = replace(BASE, sites=tuple(replace(site, in_features=site.in_features * 2) for site in BASE.sites))
    missing, damaged, sound = "sha256:" + "e" * 64, add_rows(store, seed=1), add_rows(store, seed=2)
    weights = content_paths(store, damaged).weights
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    compiler = RowCompiler(store, other_base, "bfloat16", PAGE_BYTES, {})
    try:
        for digest, kind, words in (
            (missing, AdapterDamaged, "No such file"),
            (damaged, AdapterDamaged, "its files have the digest"),
            (sound, AdapterIncompatible, "does not fit this base"),
        ):
            with pytest.raises(AdapterError, match=words) as caught:
                compiler.compile(digest, urgent=True).result(SECONDS)
            assert type(caught.value) is kind
            assert not compiler.is_compiled(digest)
    finally:
        compiler.close()


def test_what_takes_too_long_is_given_up_and_not_begun_again(
    compiler: RowCompiler, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_compiler, "MOST_SECONDS", 0.0)
    slow = add_rows(store, seed=3)
    for _ in range(2):
        with pytest.raises(InvalidAdapter, match="takes longer than 0 seconds"):
            compiler.compile(slow, urgent=True).result(SECONDS)
    monkeypatch.setattr(row_compiler, "MOST_SECONDS", SECONDS)
    compiler.compile(add_rows(store, seed=4), urgent=True).result(SECONDS)  # by another worker
    with pytest.raises(InvalidAdapter, match="takes longer"):
        compiler.compile(slow, urgent=True).result(SECONDS)


def test_content_that_no_upload_could_have_stored_is_damaged(compiler: RowCompiler, store: Path) -> None:
    """NaN has a digest like everything else; what let it into the store does not matter here."""
    digest = add_rows(store)
    weights = content_paths(store, digest).weights
    tensors = lora_tensors()
    tensors[tensor_name(Q, "lora_A.weight")][0, 0] = np.nan
    write_weights(weights, tensors)
    with pytest.raises(AdapterDamaged) as caught:
        compiler.compile(digest, urgent=True).result(SECONDS)
    found = caught.value.message.split("have the digest ")[1].split(";")[0]
    content_paths(store, digest).config.parent.rename(content_paths(store, found).config.parent)
    with pytest.raises(AdapterDamaged, match="NaN"):
        compiler.compile(found, urgent=True).result(SECONDS)


def test_a_disk_that_takes_nothing_fails_one_job(compiler: RowCompiler, store: Path) -> None:
    pid, digest = worker_pid(compiler, store), add_rows(store)
    (store / "rows").rename(store / "aside")
    (store / "rows").touch()  # no folder can be made under it
    with pytest.raises(AdapterError, match=f"{digest} could not be compiled: Not a directory"):
        compiler.compile(digest, urgent=True).result(SECONDS)
    (store / "rows").unlink()
    compiler.compile(digest, urgent=True).result(SECONDS)
    assert worker_pids() == [pid], "it goes on with the next"


def test_one_job_for_all_who_ask_and_urgent_ones_first(compiler: RowCompiler, store: Path) -> None:
    pid = worker_pid(compiler, store)
    names = ["running", "second", "third", "urgent", "fourth"]
    digests = {name: add_rows(store, seed) for seed, name in enumerate(names)}
    order = list[str]()

    def ask(name: str, urgent: bool) -> Future[None]:
        return compiler.compile(digests[name], urgent)

    os.kill(pid, signal.SIGSTOP)
    futures = {name: ask(name, urgent=name == "urgent") for name in names}
    for name, future in futures.items():
        future.add_done_callback(lambda _, name=name: order.append(name))  # type: ignore[misc]
    assert ask("fourth", urgent=True) is futures["fourth"], "the same job, moved up"
    assert ask("urgent", urgent=False) is futures["urgent"]
    assert ask("third", urgent=False) is futures["third"]
    assert ask("running", urgent=True) is futures["running"]
    assert not futures["second"].cancel(), "nobody cancels what others wait for"
    os.kill(pid, signal.SIGCONT)
    for future in futures.values():
        future.result(SECONDS)
    compiler.compile(add_rows(store, seed=5), urgent=True).result(SECONDS)  # by now all callbacks have been called
    # The first may or may not have been taken before the urgent one was asked for.
    assert [name for name in order if name != "running"] == ["urgent", "fourth", "second", "third"]


def test_a_worker_that_dies_fails_its_job_and_the_next_starts_another(compiler: RowCompiler, store: Path) -> None:
    pid = worker_pid(compiler, store)
    first, second = add_rows(store, seed=1), add_rows(store, seed=2)
    os.kill(pid, signal.SIGSTOP)
    failing, next_one = compiler.compile(first, urgent=True), compiler.compile(second, urgent=True)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(AdapterError, match=rf"died over {first} \(signal 9\)"):
        failing.result(SECONDS)
    next_one.result(SECONDS)
    assert worker_pids() != [pid]
    compiler.compile(first, urgent=True).result(SECONDS)  # asked for again, it starts anew


def test_what_is_compiled_needs_no_worker(compiler: RowCompiler, store: Path) -> None:
    digest = add_rows(store)
    compiler.compile(digest, urgent=True).result(SECONDS)
    compiler.close()
    again = make_compiler(store)
    assert again.compile(digest, urgent=False).done()
    assert not worker_pids()
    again.forget(digest)
    again.forget(digest)
    assert not again.is_compiled(digest)
    again.compile(digest, urgent=False).result(SECONDS)
    assert again.is_compiled(digest)
    again.close()


@pytest.mark.parametrize("is_asked_again", [False, True])
def test_what_is_forgotten_while_it_is_made_leaves_nothing_unless_it_is_asked_for_again(
    compiler: RowCompiler, store: Path, is_asked_again: bool
) -> None:
    pid, digest = worker_pid(compiler, store), add_rows(store)
    os.kill(pid, signal.SIGSTOP)
    being_made = compiler.compile(digest, urgent=False)
    while digest not in compiler._running:
        time.sleep(0.001)
    compiler.forget(digest)
    if is_asked_again:
        assert compiler.compile(digest, urgent=True) is being_made
    os.kill(pid, signal.SIGCONT)
    being_made.result(SECONDS)
    assert compiler.is_compiled(digest) == is_asked_again


def test_a_worker_that_cannot_be_started_says_so_without_a_path(
    compiler: RowCompiler, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_compiler, "WORKER_COMMAND", (str(store / "no such program"),))
    with pytest.raises(AdapterError, match="cannot be started: No such file or directory") as caught:
        compiler.compile(add_rows(store), urgent=True).result(SECONDS)
    assert str(store) not in caught.value.message


def test_close_ends_the_worker_and_every_wait(store: Path) -> None:
    compiler = make_compiler(store)
    pid = worker_pid(compiler, store)
    os.kill(pid, signal.SIGSTOP)  # it will not end of itself
    futures = [compiler.compile(add_rows(store, seed), urgent=False) for seed in range(3)]
    compiler.close()
    assert not worker_pids()
    for future in [*futures, compiler.compile(add_rows(store, seed=3), urgent=True)]:
        with pytest.raises(AdapterError, match=r"stopping|died"):
            future.result(0)


def test_rows_of_content_that_is_gone_are_swept_at_the_start(store: Path) -> None:
    compilers = [make_compiler(store, row_dtype) for row_dtype in ("bfloat16", "float32")]
    kept, gone = add_rows(store), add_rows(store, seed=1)
    for compiler in compilers:
        for digest in (kept, gone):
            compiler.compile(digest, urgent=False).result(SECONDS)
        compiler.close()
    first, second = compilers
    assert first.rows_path(kept) != second.rows_path(kept), "rows of another dtype are other rows"
    unfinished = first.rows_path(kept).with_name("0123.tmp")
    unfinished.touch()
    ContentFolder(store).remove(gone)
    make_compiler(store).close()
    assert first.is_compiled(kept)
    assert second.is_compiled(kept)
    assert not first.is_compiled(gone)
    assert not second.is_compiled(gone)
    assert not unfinished.exists()


def test_the_worker_has_low_priority(compiler: RowCompiler, store: Path) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, worker_pid(compiler, store)) == min(own + NICENESS, 19)


def test_the_worker_needs_no_torch_and_ends_with_its_stdin(store: Path) -> None:
    digest, path = add_scales(store), store / "made.rows"
    spec = WorkerSpec(str(store), BASE, "bfloat16", PAGE_BYTES, {V: BASE_BIAS[V].tobytes()})
    jobs = BytesIO()
    for message in (spec, CompileJob(digest, str(path)), CompileJob("sha256:" + "e" * 64, str(path))):
        write_frame(jobs, message)
    script = (
        "import sys; from heddle_adapters import compile_worker; compile_worker.main(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    environment = {"PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}
    ended = subprocess.run(
        [sys.executable, "-c", script], input=jobs.getvalue(), stdout=subprocess.PIPE, env=environment, check=False
    )
    assert ended.returncode == 0
    results = BytesIO(ended.stdout)
    assert read_frame(results, CompileResult) == CompileResult()
    failed = read_frame(results, CompileResult)
    assert failed is not None
    assert failed.error == "AdapterDamaged"
    assert read_frame(results, CompileResult) is None
    assert read_rows(path, digest).digest == digest


def test_a_worker_without_work_is_dismissed_and_the_next_job_starts_another(
    compiler: RowCompiler, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heddle_adapters.row_compiler.IDLE_SECONDS", 0.2)
    first = worker_pid(compiler, store)
    deadline = time.monotonic() + SECONDS
    while worker_pids():
        assert time.monotonic() < deadline, "the idle worker stays"
        time.sleep(0.02)
    compiler.compile(digest := add_rows(store), urgent=True).result(SECONDS)
    assert compiler.is_compiled(digest)
    assert worker_pids() != [first]
