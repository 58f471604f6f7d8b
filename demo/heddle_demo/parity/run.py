"""`heddle bench methods`: every sample on both bases, and the table of docs/methods.md."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from heddle_demo.bench.failure import BenchFailed
from heddle_demo.bench.machine import describe_machine
from heddle_demo.parity.bases import demo_base, tiny_llama
from heddle_demo.parity.measure import Bases, Measured, measure
from heddle_demo.parity.page import MethodResult, rewrite_page, save_results
from heddle_demo.parity.peft_mixed import mixed_in_peft
from heddle_demo.parity.peft_sample import PeftSample
from heddle_demo.parity.samples import SAMPLES

NUM_THREADS = 1


def run_methods_bench(page: Path, json: Path, say: Callable[[str], None]) -> None:
    """Measure all, write both files, and say what breaks a limit. Raises BenchFailed where a sample is refused."""
    torch.set_num_threads(NUM_THREADS)
    with tempfile.TemporaryDirectory(prefix="heddle-methods-") as folder:
        say(f"{len(SAMPLES)} samples, {NUM_THREADS} thread")
        exact_base = tiny_llama(Path(folder) / "tiny")
        exact = _measured("a tiny Llama in float32", exact_base, Path(folder) / "exact", say)
        rounded = _measured("the demo's base, NF4 in bfloat16", demo_base(), Path(folder) / "rounded", say)
        say("PEFT's own mixed batches")
        prompt = exact_base.prompts[0]
        results = []
        for number, sample in enumerate(SAMPLES):
            in_peft = "none"
            if isinstance(sample, PeftSample):
                in_peft = mixed_in_peft(sample, exact_base.truth, prompt, Path(folder) / "mixed" / str(number))
            results.append(MethodResult.of(sample.name, sample.oracle_name, exact, rounded, in_peft))
    save_results(json, describe_machine(), results)
    page.write_text(rewrite_page(page, results))
    for result in results:
        if not result.holds:
            say(f"{result.name} breaks a limit: {result.row}")
    say(f"{sum(result.holds for result in results)} of {len(results)} hold every limit; {page} and {json} are written")


def _measured(name: str, bases: Bases, folder: Path, say: Callable[[str], None]) -> Measured:
    say(name)
    measured = measure(bases, SAMPLES, folder)
    if measured.refusals:
        refused = "; ".join(f"{sample}: {reason}" for sample, reason in measured.refusals.items())
        raise BenchFailed(f"on {name} some samples are refused: {refused}")
    return measured
