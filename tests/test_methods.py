"""Every method against PEFT (or its formula), on both bases: alone, in one batch of all, in chunks, after a reload."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from heddle_adapters.methods.refused_methods import REFUSED_METHODS
from heddle_demo.parity.bases import demo_base, tiny_llama
from heddle_demo.parity.cost import COSTED, cost_of_methods
from heddle_demo.parity.measure import ALONE, CHUNKED, LIMIT_BF16, LIMIT_FP32, MIXED, WAYS, Measured, measure
from heddle_demo.parity.page import load_results, rewrite_page
from heddle_demo.parity.samples import SAMPLES
from tolerances import LOGITS_FP32, PEFT_ERROR_MULTIPLE_BF16

DOCS = Path(__file__).parent.parent / "docs"
PAGE, RESULTS = DOCS / "methods.md", DOCS / "measurements" / "methods.json"
NAMES = [sample.name for sample in SAMPLES]
# Of a percentile's noise there is too much in the few places that a test can afford: the command measures it.
NUM_PROMPTS, NUM_NEW_TOKENS = 2, 5


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("exact")
    return measure(tiny_llama(folder / "model", NUM_NEW_TOKENS), SAMPLES, folder)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(demo_base(NUM_PROMPTS, NUM_NEW_TOKENS), SAMPLES, tmp_path_factory.mktemp("rounded"))


def test_nothing_is_refused(exact: Measured, rounded: Measured) -> None:
    assert exact.refusals == rounded.refusals == {}
    assert len(NAMES) >= 20, "a batch of twenty methods"
    assert sum(errors.num_decided for ways in exact.errors.values() for errors in ways.values()) > 100


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_the_oracle(name: str, way: str, exact: Measured) -> None:
    assert LIMIT_FP32 == LOGITS_FP32
    errors = exact.errors[name][way]
    assert errors.holds_fp32, f"worst {errors.worst:.1e}, effect {errors.largest_effect:.1e}"


@pytest.mark.parametrize("name", [sample.name for sample in SAMPLES if not sample.on_plain_base_only])
def test_bfloat16_errs_as_little_as_the_oracle_does(name: str, rounded: Measured) -> None:
    assert LIMIT_BF16 == PEFT_ERROR_MULTIPLE_BF16
    errors = rounded.errors[name]
    ours, theirs, effect = (
        sum(sum(getattr(each, part)) for each in errors.values()) for part in ("ours", "peft", "effect")
    )
    assert ours <= LIMIT_BF16 * theirs
    assert effect >= 10 * ours


@pytest.mark.parametrize("way", [MIXED, CHUNKED])
def test_a_batch_of_all_methods_answers_what_each_answers_alone(way: str, exact: Measured) -> None:
    for name in NAMES:
        for alone, together in zip(exact.answers[ALONE][name], exact.answers[way][name], strict=True):
            assert together.token_ids == alone.token_ids, name
            for one, other in zip(alone.logprobs, together.logprobs, strict=True):
                assert ((one - other).abs() <= LOGITS_FP32 * one.abs().clamp(min=1)).all(), name


def test_the_page_says_what_was_measured() -> None:
    results = load_results(RESULTS)
    assert rewrite_page(PAGE, results) == PAGE.read_text(), "run `heddle bench methods`"
    assert [result.name for result in results] == NAMES, "run `heddle bench methods`"
    assert all(result.holds for result in results)


def test_the_page_names_every_refused_method() -> None:
    page = PAGE.read_text()
    assert all(re.search(rf"`{kind}`", page) for kind in REFUSED_METHODS)


@pytest.mark.slow
def test_many_methods_cost_no_more_than_loras_of_the_same_rows(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    cost = cost_of_methods(COSTED, tmp_path)
    assert cost.ratio <= 1.1, cost
    assert all(waste <= 1.05 for waste in cost.memory.values()), cost
