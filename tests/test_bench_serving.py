"""`heddle bench serving` and `heddle bench step`: the real commands on a tiny shape agree with themselves."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner, Result

from heddle_demo.bench.agreement import Agreement, difference
from heddle_demo.bench.generation import Generation
from heddle_demo.bench.mixes import MIXES, num_distinct
from heddle_demo.bench.peft_arm import require_peft
from heddle_demo.bench.shapes import SHAPES, ModelShape
from heddle_server.bench_cli import app

TINY = ("--shape", "tiny", "--device", "cpu", "--batch", "4", "--adapters", "4", "--rank", "8", "--quick")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def results_of(json_path: Path, *arguments: str) -> dict[str, Any]:
    """What the command's last line says, which its file says as well."""
    finished = bench(*arguments, "--json", str(json_path))
    assert finished.exit_code == 0, finished.output
    *lines, last = finished.stdout.splitlines()
    results: dict[str, Any] = json.loads(last)
    assert json.loads(json_path.read_text()) == results
    assert any("tiny" in line for line in lines), "a table for people comes first"
    return results


def test_serving_against_peft_agrees_with_itself(tmp_path: Path) -> None:
    results = results_of(tmp_path / "serving.json", "serving", *TINY, "--against", "peft")
    arms, mixes = results["arms"], ("base", "identical", "distinct")
    assert set(arms) == {"heddle", "peft"}
    assert results["machine"]["peft"]
    assert len(results["turns"]) == 2 * 3 * 2
    for mix in mixes:
        ours, theirs = arms["heddle"][mix], arms["peft"][mix]
        assert results[f"{mix}_vs_peft"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
        for name, arm in (("heddle", ours), ("peft", theirs)):
            turns = [turn for turn in results["turns"] if (turn["arm"], turn["mix"]) == (name, mix)]
            assert arm["rounds_tokens_per_second"] == [turn["tokens_per_second"] for turn in turns]
            assert arm["tokens_per_second"] == median(arm["rounds_tokens_per_second"])
            assert all(turn["seconds"] * turn["tokens_per_second"] == pytest.approx(4 * 8) for turn in turns)
    decode = {mix: arms["heddle"][mix]["decode_tokens_per_second"] for mix in mixes}
    assert results["distinct_retention"] == pytest.approx(decode["distinct"] / decode["base"])
    assert results["retentions"]["distinct"]["floor"] < results["retentions"]["identical"]["floor"] < 1
    by_adapter = {agreement["adapter"]: agreement for agreement in results["agreement"]}
    assert set(by_adapter) == {None, 0}
    for agreement in by_adapter.values():
        assert agreement["num_equal"] == agreement["num_decided"] > agreement["num_tokens"] / 2
        assert agreement["relative_error"] < results["adapter_effect"] / 4


def test_a_step_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    results = results_of(tmp_path / "step.json", "step", *TINY)
    steps = {step["mix"]: step for step in results["steps"]}
    assert {mix: step["num_distinct"] for mix, step in steps.items()} == {"base": 0, "identical": 1, "distinct": 4}
    for mix, step in steps.items():
        parts = step["parts"]
        total = step["host_seconds"] + sum(parts.values()) + step["rest_seconds"]
        assert total == pytest.approx(step["step_seconds"])
        assert min(parts["4-bit linears"], parts["attention"], parts["output layer"], parts["sampling"]) > 0
        assert step["rest_seconds"] > 0
        assert (parts["adapter rows"] > 0) == (mix != "base"), "base requests run no adapter code"
        assert 0 < step["floor"]["floor_seconds"] < step["step_seconds"]
        assert step["host_and_plan_seconds"] == pytest.approx(step["host_seconds"] + parts["row plan"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serving", "--shape", "huge"), "--shape knows tiny"),
        (("serving", "--against", "vllm"), "--against knows peft"),
        (("serving", "--mixes", "base,zipf"), "--mixes knows base"),
        pytest.param(
            ("step", "--device", "cuda"),
            "no NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(arguments: tuple[str, ...], words: str) -> None:
    finished = bench(*arguments)
    assert finished.exit_code == 1
    assert finished.stderr.startswith("heddle: ")
    assert words in finished.stderr


def test_without_peft_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    require_peft()
    monkeypatch.setattr("heddle_loadtest.baseline.peft_runner.find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"peft is not installed.*pip install"):
        require_peft()


def test_mixes_are_what_punica_compares() -> None:
    mixes = {name: make(32, 32) for name, make in MIXES.items()}
    assert {name: num_distinct(mix) for name, mix in mixes.items()} == {
        "base": 0,
        "identical": 1,
        "uniform": 5,
        "skewed": 9,
        "distinct": 32,
    }
    assert all(len(mix) == 32 for mix in mixes.values())
    counts = [mixes["skewed"].count(adapter) for adapter in range(9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] / counts[1] == pytest.approx(1.5, abs=0.2)
    assert num_distinct(MIXES["distinct"](32, 8)) == 8
    assert num_distinct(MIXES["skewed"](32, 3)) == 3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shape_is_the_model_that_transformers_builds(shape: ModelShape, tmp_path: Path) -> None:
    shape.write_config(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameters == dict(shape.tensors())
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_weights


def test_decode_speed_leaves_the_first_tokens_out() -> None:
    generation = Generation([[1, 2, 3]] * 2, seconds=3.0, prefill_seconds=1.0)
    assert generation.tokens_per_second == 2
    assert generation.decode_tokens_per_second == 2
    assert Generation([[1]], seconds=1.0).decode_tokens_per_second is None


def test_agreement_counts_what_is_decided() -> None:
    theirs = torch.tensor([[0.0, -1.0, -9.0], [0.0, -0.01, -9.0], [0.0, -2.0, -9.0]])
    ours = torch.tensor([[0.0, -1.0, -9.0], [-0.02, 0.0, -9.0], [-2.0, 0.0, -9.0]])
    agreement = Agreement.of(None, ours, theirs)
    assert (agreement.num_tokens, agreement.num_decided, agreement.num_equal) == (3, 2, 1)
    assert agreement.relative_error > 0
    assert difference(theirs + 5, theirs) == pytest.approx(0, abs=1e-6), "a shift of all logits is no difference"
