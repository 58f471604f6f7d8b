"""`heddle bench kernels` and `make gpu`: the real commands on a tiny shape agree with themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from heddle_demo.bench.gpu_parts import ELEMENTWISE, OTHER_MATMULS, part_of
from heddle_demo.bench.gpu_plan import TEST_FILE, TESTED, bench_parts
from heddle_demo.bench.layers import JOINED, widths
from heddle_demo.bench.mixes import MIXES
from heddle_demo.bench.random_rows import RandomRows, one_token_each
from heddle_demo.bench.rotation import num_copies
from heddle_demo.bench.shapes import SHAPES
from heddle_demo.bench.text_table import text_table
from heddle_demo.bench.timed_ops import ATTENTION, BASE, ROWS
from heddle_kernels.reference import ReferenceOps
from heddle_server.bench_cli import app

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def check_kernels(results: dict[str, Any], num_tokens: int, num_rows: int) -> None:
    """Figures that follow from others do, errors are small, no case is missing."""
    bandwidth = results["bandwidth_bytes_per_second"]
    arms = {part: {timing["arm"] for timing in results[part]} for part in ("linears", "rows")}
    assert arms["rows"] == {"torch loop", "gather, bmm", "heddle"}
    assert arms["linears"] >= {"dense", "bnb fused", "bnb dequant", "heddle"}
    assert len(results["linears"]) == len(JOINED) * num_tokens * len(arms["linears"])
    assert len(results["rows"]) == len(JOINED) * num_rows * 3
    for timing in results["linears"] + results["rows"]:
        assert timing["seconds"] > 0
        assert timing["bytes_per_second"] == pytest.approx(timing["num_bytes"] / timing["seconds"])
        assert timing["floor_share"] == pytest.approx(timing["floor_bytes"] / bandwidth / timing["seconds"])
        assert timing["floor_bytes"] <= timing["num_bytes"]
        assert timing["relative_error"] < 0.02, timing
    for timing in results["linears"]:
        in_features, out_features = widths(SHAPES["tiny"], JOINED[timing["layer"]])
        assert (timing["size"]["in"], timing["size"]["out"]) == (in_features, sum(out_features))


def test_the_command_agrees_with_itself(tmp_path: Path) -> None:
    arguments = ("--shape", "tiny", "--device", "cpu", "--quick", "--rank", "16", "--batch", "8")
    finished = CliRunner().invoke(app, ["kernels", *arguments, "--json", str(tmp_path / "kernels.json")])
    assert finished.exit_code == 0, finished.output
    results = json.loads(finished.stdout.splitlines()[-1])
    assert results == json.loads((tmp_path / "kernels.json").read_text())
    assert results["skipped"] == []
    check_kernels(results, num_tokens=4, num_rows=2 * 2)
    assert "gate_up" in finished.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_gpu_says_at_once_that_there_is_no_gpu() -> None:
    finished = run("heddle_demo.bench.gpu_run")
    assert finished.returncode == 2
    assert "no NVIDIA GPU" in finished.stderr
    assert "Traceback" not in finished.stderr


def gpu_run_on_cpu(json_path: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    finished = run("heddle_demo.bench.gpu_run", "--device", "cpu", "--quick", "--json", str(json_path), *arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    content = json.loads(json_path.read_text())
    summary = json.loads(finished.stdout.splitlines()[-1])
    assert summary["parts"] == {part["name"]: part["status"] for part in content["parts"]}
    return finished.stdout, content


def test_the_gpu_program_runs_its_parts_and_keeps_their_results(tmp_path: Path) -> None:
    output, content = gpu_run_on_cpu(tmp_path / "gpu.json", "--only", "tests,kernels")
    tests, kernels = content["parts"]
    assert tests["status"] == kernels["status"] == "passed"
    outcomes = {test["outcome"] for test in tests["result"]["tests"]}
    assert outcomes == {"passed" if torch.cuda.is_available() else "skipped"}
    check_kernels(kernels["result"], num_tokens=1, num_rows=2)
    assert content["device"] == "cpu"
    assert content["machine"]["torch"] == torch.__version__
    assert "Packages that are missing here: none." in output


def test_the_gpu_program_skips_what_it_has_no_time_for(tmp_path: Path) -> None:
    output, content = gpu_run_on_cpu(tmp_path / "gpu.json", "--seconds", "1")
    assert {part["status"] for part in content["parts"]} == {"skipped"}
    assert "the time is used up" in output


@pytest.mark.slow
def test_the_gpu_program_runs_through(tmp_path: Path) -> None:
    _, content = gpu_run_on_cpu(tmp_path / "gpu.json")
    assert [part["bench"] for part in content["parts"]] == ["tests", "kernels", "serving", "step"]
    assert {part["status"] for part in content["parts"]} == {"passed"}


def test_random_rows_lie_where_the_table_says() -> None:
    rows = RandomRows.of(32, (48, 16), [3, 5], num_layers=2, dtype=torch.float32, device=CPU)
    group, ops = rows.groups[1], ReferenceOps()
    x, y = torch.randn(3, 32), torch.zeros(3, 64)
    plan = ops.plan_rows(rows.rows, rows.vectors, rows.table, one_token_each([0, 1, 1]))
    ops.expand_add(y, ops.shrink(x, plan, group), plan, group, None)
    for token, slot in enumerate([0, 1, 1]):
        for site, columns in zip(group.sites, (slice(48), slice(48, 64)), strict=True):
            a, b = rows.a(slot, site, 32), rows.b(slot, site, columns.stop - (columns.start or 0))
            torch.testing.assert_close(y[token, columns], x[token] @ a.T @ b)
    assert rows.rows.numel() == 2 * (3 + 5) * (32 + 48 + 32 + 16)


def test_a_rotation_goes_round_the_models_layers_within_limits() -> None:
    assert num_copies(1 << 20, 24, CPU) == 24
    assert num_copies(1 << 29, 24, CPU) == 2
    assert num_copies(1 << 40, 24, CPU) == 1


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("_nf4_gemm_kernel", BASE),
        ("_reduce_kernel", BASE),
        ("void kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>", BASE),
        ("_decode_reduce_kernel", ATTENTION),
        ("_prefill_kernel", ATTENTION),
        ("_write_kv_kernel", ATTENTION),
        ("_shrink_kernel", ROWS),
        ("_expand_kernel", ROWS),
        ("nvjet_tst_128x8_64x12_4x1_v_bz_TNT", OTHER_MATMULS),
        ("_rms_norm_kernel", ELEMENTWISE),
        ("Memcpy DtoH (Device -> Pinned)", ELEMENTWISE),
    ],
)
def test_kernels_are_known_by_their_names(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


def test_every_popularity_that_is_measured_exists() -> None:
    for part in bench_parts("cuda", is_quick=False):
        assert set(part.settings.get("mixes", ())) <= set(MIXES)


def test_every_gpu_test_is_in_one_part() -> None:
    names = re.findall(r"^def (test_\w+)", (ROOT / TEST_FILE).read_text(), re.MULTILINE)
    assert names
    for name in names:
        assert sum(any(word in name for word in words.split(" or ")) for words in TESTED) == 1, name


def test_a_table_is_aligned() -> None:
    assert text_table(["name", "us"], [["a", "1.5"], ["longer", "10.5"]]).splitlines() == [
        "name      us",
        "------  ----",
        "a        1.5",
        "longer  10.5",
    ]
