"""`make gpu`: every kernel tested and measured on a machine with an NVIDIA GPU, in its own Python, without network.

Each part is a process of its own, so that one that breaks the GPU's context or takes too long costs nothing but its
own results. Needs torch, triton and numpy; what else is missing is named, with the parts that need it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from heddle_demo.bench.gpu_plan import TEST_FILE, Part, bench_parts, test_parts

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "loadtest" / "results"
BUDGET_SECONDS = 460.0  # of the eight minutes; what is left is for starting and for writing results
LEAST_SECONDS = 15.0  # no part is begun with less
NO_GPU_STATUS = 2
OPTIONAL_PACKAGES = ("triton", "bitsandbytes", "transformers", "accelerate", "safetensors", "msgspec", "peft", "pytest")
# The settings of the repository's own test runs want warnings to be errors and may name options of absent plugins.
PYTEST = ("-m", "pytest", "-m", "cuda", "-q", "--tb=short", "-p", "no:cacheprovider", "-o", "filterwarnings=default")


@dataclass(frozen=True)
class Outcome:
    """What became of one part."""

    part: Part
    status: str  # "passed", "failed", "out of time" or "skipped"
    seconds: float
    reason: str | None = None
    result: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.part.name,
            "bench": self.part.bench,
            "status": self.status,
            "seconds": self.seconds,
            "reason": self.reason,
            "result": self.result,
        }


def main() -> int:
    """The exit status: 0 when every part that could run passed, 1 when one failed, 2 without an NVIDIA GPU."""
    options = _options()
    if (why := _why_no_device(options.device)) is not None:
        print(f"make gpu: {why}", file=sys.stderr)
        return NO_GPU_STATUS
    missing = [package for package in OPTIONAL_PACKAGES if find_spec(package) is None]
    print(f"Packages that are missing here: {', '.join(missing) or 'none'}.", flush=True)
    deadline = time.monotonic() + options.seconds
    wanted, outcomes = options.only.split(","), list[Outcome]()
    if "tests" in wanted:
        with ThreadPoolExecutor(len(tests := test_parts(is_quick=options.quick))) as together:
            outcomes += together.map(lambda part: _run(part, deadline), tests)
    benches = [part for part in bench_parts(options.device, is_quick=options.quick) if part.bench in wanted]
    outcomes += [_run(part, deadline) for part in benches]
    path = options.json or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{_slug(_device_name(options.device))}.json"
    _write(path, outcomes, missing, options.device)
    summary = {"bench": "gpu", "file": str(path), "parts": {each.part.name: each.status for each in outcomes}}
    print(f"\n{json.dumps(summary)}", flush=True)
    return 1 if any(outcome.status in ("failed", "out of time") for outcome in outcomes) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for all results; by default in loadtest/results")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="for all parts together")
    parser.add_argument("--only", default="tests,kernels,serving,step", help="these kinds of parts, with commas")
    # For the tests of this program itself, on machines without a GPU.
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _why_no_device(device: str) -> str | None:
    if find_spec("torch") is None or find_spec("numpy") is None:
        return f"{sys.executable} has no torch or no numpy; PYTHON=… chooses another Python."
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"there is no NVIDIA GPU that torch {torch.__version__} can use on this machine."
    return None


def _run(part: Part, deadline: float) -> Outcome:
    """One part, between a line that names it and a line that says what became of it."""
    print(f"\n=== {part.name}", flush=True)
    outcome = _outcome(part, deadline)
    why = "" if outcome.reason is None else f": {outcome.reason}"
    print(f"=== {part.name}: {outcome.status} in {outcome.seconds:.0f} s{why}", flush=True)
    return outcome


def _outcome(part: Part, deadline: float) -> Outcome:
    """The part's own output goes to ours as it comes."""
    missing = [package for package in part.packages if find_spec(package) is None]
    if missing:
        return Outcome(part, "skipped", 0.0, f"needs {', '.join(missing)}")
    seconds = min(part.seconds, deadline - time.monotonic())
    if seconds < min(LEAST_SECONDS, part.seconds):
        return Outcome(part, "skipped", 0.0, "the time is used up")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="heddle-gpu-") as folder:
        json_path = Path(folder) / "result.json"
        status = _status_within(seconds, _command(part, json_path), folder)
        result = json.loads(json_path.read_text()) if json_path.exists() else None
    elapsed = time.monotonic() - started
    if status is None:
        return Outcome(part, "out of time", elapsed, f"ended after {seconds:.0f} s", result)
    if status == 0:
        return Outcome(part, "passed", elapsed, result=result)
    return Outcome(part, "failed", elapsed, f"exit status {status}", result)


def _status_within(seconds: float, command: list[str], folder: str) -> int | None:
    """The command's exit status; None if it took longer and was ended with all that it had started.

    Its temporary files go to `folder`, since whoever is ended leaves them.
    """
    environment = {**_environment(), "TMPDIR": folder}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _command(part: Part, json_path: Path) -> list[str]:
    if part.bench == "tests":
        return [sys.executable, *PYTEST, TEST_FILE, "-k", part.settings["names"], f"--json-results={json_path}"]
    return [sys.executable, "-m", "heddle_demo.bench.part", part.bench, json.dumps(part.settings), str(json_path)]


def _environment() -> dict[str, str]:
    path = [str(ROOT / name) for name in ("server", "kernels", "adapters", "loadtest", "demo", "tests")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*path, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "160",
    }


def _write(path: Path, outcomes: list[Outcome], missing: list[str], device: str) -> None:
    from heddle_demo.bench.machine import describe_machine

    content = {
        "schema_version": 1,
        "bench": "gpu",
        "machine": describe_machine(),
        "device": _device_name(device),
        "missing_packages": missing,
        "parts": [outcome.to_json() for outcome in outcomes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(0) if device == "cuda" else "cpu"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
