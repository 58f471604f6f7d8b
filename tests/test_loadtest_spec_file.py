"""Workload files: what is wrong is named, what is laid over what is exact, and what is written loads again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.spec import Adapters, Gamma, Poisson, Workload, Zipf
from heddle_loadtest.workload.spec_file import dump_workload, folder_of, load_workload

GOOD = """\
name: mine
requests: 30
arrivals: {kind: poisson, rate: 2}
adapters: {count: 4}
popularity: {kind: zipf, alpha: 0.5}
variants:
  bursty: {arrivals: {kind: gamma, rate: 3, cv: 2}}
  quick: {arrivals: {rate: 9}}
  named: {name: other, adapters: {names: [a, b]}}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    return path


def test_a_file_loads(spec: Path) -> None:
    workload = load_workload(str(spec))
    assert workload.arrivals == Poisson(rate=2)
    assert workload.popularity == Zipf(alpha=0.5)
    assert tuple(load_workload(str(spec)).variants) == ("bursty", "quick", "named")
    assert folder_of(str(spec)) == spec.parent


def test_a_variant_is_laid_over_the_rest(spec: Path) -> None:
    quick, bursty, named = (load_workload(str(spec), variant=variant) for variant in ("quick", "bursty", "named"))
    assert quick.arrivals == Poisson(rate=9)
    assert bursty.arrivals == Gamma(rate=3, cv=2)  # another kind takes the old one's place
    assert named.adapters == Adapters(names=("a", "b"))  # and names the count's
    assert (quick.name, bursty.name, named.name) == ("mine-quick", "mine-bursty", "other")
    assert quick.variants == {}


def test_overrides_come_last_and_in_order(spec: Path) -> None:
    overrides = ["arrivals.rate=5", "popularity.kind=skewed", "popularity.ratio=2.5", "tenants.a.output.tokens=3"]
    workload = load_workload(str(spec), variant="bursty", overrides=overrides)
    assert workload.arrivals == Gamma(rate=5, cv=2)
    assert msgspec.to_builtins(workload.popularity) == {"kind": "skewed", "ratio": 2.5}
    output = workload.tenants["a"].output
    assert output is not None
    assert output.tokens == 3
    late_kind = load_workload(str(spec), overrides=["tenants.a.arrivals.rate=7", "tenants.a.arrivals.kind=poisson"])
    assert late_kind.tenants["a"].arrivals == Poisson(rate=7)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["arrivals.ratee=3"], ["arrivals.ratee: is no key here", "Did you mean `rate`", "Known: kind, rate"]),
        (["requets=3"], ["requets: is no key here", "Did you mean `requests`"]),
        (["tenants.a.adapters.kinds=[{rnak: 3}]"], ["tenants.a.adapters.kinds.0.rnak", "Did you mean `rank`"]),
        (["popularity.kind=zip"], ["popularity.kind 'zip'", "Did you mean `zipf`", "storm, uniform, weighted, zipf"]),
        (["output={}"], ["output: lacks the key `tokens`"]),
        (["prompt={tokens: 3}"], ["prompt: lacks the key `kind`", "Kinds: questions, token-ids, words"]),
        (["arrivals.rate=-2"], ["arrivals.rate '-2'", "a number above 0 up to 1,000,000"]),
        (["arrivals.rate=.nan"], ["arrivals.rate 'nan'", "a number above 0 up to 1,000,000"]),
        (["arrivals.rate=fast"], ["arrivals.rate 'fast'", "a number above 0"]),
        (["tenants.a.arrivals={kind: poisson, rate: 0}"], ["tenants.a.arrivals.rate '0'", "a number above 0"]),
        (["requests=0"], ["requests '0'", "a whole number from 1 up to 10,000,000 or null"]),
        (["requests=1.5"], ["requests '1.5'", "a whole number"]),
        (
            ["output.tokens=0"],
            ["output.tokens '0'", "a whole number from 1 up to 1,000,000 or a mapping with a `kind`"],
        ),
        (["output.tokens={kind: uniform, low: 9, high: 3}"], ["output.tokens: `high` 3 is below `low` 9"]),
        (["output.exact=1"], ["output.exact '1'", "true or false"]),
        (["popularity={kind: weighted, weights: []}"], ["popularity.weights '[]'", "a list of 1 or more"]),
        (["name=a b"], ["name 'a b'", "text like"]),
        (["adapters={names: [a], count: 2}"], ["adapters: give exactly one of `names`, `count` and `listed`"]),
        (["requests=null"], ["the run has no end", "`seconds`"]),
        (["arrivals=3"], ["arrivals '3'", "a mapping with a `kind`"]),
        (["slo=3"], ["slo '3'", "null or a mapping of keys to values"]),
        (["arrivals"], ["set 'arrivals'", "no dotted key with a value"]),
        (["arrivals.rate=[1"], ["set 'arrivals.rate=[1'", "no YAML value"]),
    ],
    ids=str,
)
def test_a_bad_setting_is_named(spec: Path, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(SpecError) as raised:
        load_workload(str(spec), overrides=overrides)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["arrivals={kind: ramp, rate_from: 1, rate_to: 2}"], ["seconds: is missing"]),
        (["arrivals={kind: ramp, rate_from: 0, rate_to: 0}", "seconds=3"], ["arrivals.rate_to '0'"]),
        (["arrivals={kind: bursts, rate_on: 1, on_seconds: 0.00001, off_seconds: 1}"], ["arrivals.on_seconds '1e-05'"]),
        (["popularity={kind: drift, hot: 5, period_seconds: 1}"], ["popularity.hot '5'", "more than", "4"]),
        (["popularity={kind: storm, warm: 5, at_seconds: 1}"], ["popularity.warm '5'"]),
        (["tenants.a.popularity={kind: weighted, weights: [1, 2, 3, 4, 5]}"], ["tenants.a.popularity.weights '5'"]),
        (["popularity={kind: weighted, weights: [0, 0]}"], ["popularity.weights: are all 0"]),
        (["adapters.names=[a]", "popularity.kind=by-rank"], ["popularity.kind 'by-rank'", "`adapters.count`"]),
        (
            ["arrivals={kind: closed, streams: 2}", "popularity={kind: storm, warm: 1, at_seconds: 1}"],
            ["popularity.kind: moves with time", "closed loop"],
        ),
        (["output.tokens.kind=trace"], ["output.tokens.kind 'trace': needs arrivals from a trace"]),
        (["prompt={kind: words, tokens: {kind: trace}}"], ["prompt.tokens.kind 'trace'"]),
        (["uploads={count: 4, every_seconds: 1}"], ["uploads.count '4'", "Give 5 adapters or more"]),
        (["uploads={count: 2, every_seconds: 9}", "seconds=10"], ["uploads.every_seconds '9.0'", "18 seconds"]),
        (
            ["uploads={count: 2, every_seconds: 9}", "arrivals={kind: closed, streams: 2}"],
            ["arrivals.kind 'closed': has no times to upload at"],
        ),
        (["uploads={count: 2, every_seconds: 9}", "adapters.listed=true"], ["uploads: need adapters"]),
        (["tenants={a b: {}}"], ["tenants 'a b': is no name"]),
        (["adapters.name=one"], ["adapters.name 'one': stands for 4 adapters"]),
        (["adapters.name='{number}'"], ["adapters.name '{number}': is no pattern"]),
        (["adapters.names=[a, b, a]"], ["adapters.names 'a': stands for 2 adapters"]),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_named(spec: Path, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(SpecError) as raised:
        load_workload(str(spec), overrides=overrides)
    for part in parts:
        assert part in str(raised.value)


def test_distinct_is_fine_with_fewer_adapters_than_requests(spec: Path) -> None:
    assert load_workload(str(spec), overrides=["popularity.kind=distinct"]).requests == 30


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: a\nrequests: [1\narrivals: 3\n", ["line 3"]),
        ("name: a\n  requests: 1\n", ["line 2"]),
        ("name: a\n\trequests: 1\n", ["line 2"]),
        ("- a\n", ["no mapping of keys"]),
        ("", ["no mapping of keys"]),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as raised:
        load_workload(str(path))
    for part in [str(path), *parts]:
        assert part in str(raised.value)


def test_a_missing_file_a_folder_and_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(SpecError, match=str(path)):
            load_workload(str(path))


def test_an_unknown_name_and_an_unknown_variant_list_what_there_is(spec: Path) -> None:
    with pytest.raises(SpecError, match=r"Did you mean `smoke`\? Known: chameleon, dlora-skew, punica-fig11"):
        load_workload("smok")
    with pytest.raises(SpecError, match=r"Did you mean `quick`\? Known: bursty, named, quick"):
        load_workload(str(spec), variant="quik")
    with pytest.raises(SpecError, match="It has none: leave the variant out"):
        load_workload("smoke", variant="quik")


def test_a_variant_that_is_no_mapping_is_named(spec: Path) -> None:
    spec.write_text(GOOD.replace("{arrivals: {rate: 9}}", "9"))
    with pytest.raises(SpecError, match=r"variants\.quick '9': is no mapping"):
        load_workload(str(spec), variant="quick")


def test_writing_leaves_out_what_has_its_default() -> None:
    workload = Workload(name="a", requests=3, arrivals=Poisson(rate=1.5), adapters=Adapters(names=("base",)))
    assert dump_workload(workload) == "name: a\nrequests: 3\narrivals:\n  kind: poisson\n  rate: 1.5\n"


@pytest.mark.parametrize(
    "override",
    [
        "arrivals={kind: closed, streams: 3}",
        "arrivals={kind: constant, rate: 0.1}",
        "arrivals={kind: bursts, rate_on: 9, on_seconds: 1, off_seconds: 2, random_phases: true}",
        "arrivals={kind: diurnal, rate: 9, swing: 0.3, period_seconds: 1.0e-3}",
        "arrivals={kind: trace, file: 'a: b.csv', speed: 1.0e-6}",
        "popularity={kind: drift, hot: 2, period_seconds: 1.0e+7}",
        "popularity={kind: weighted, weights: [0.1, 3]}",
        "popularity={kind: dealt, stride: 8}",
        "prompt={kind: questions, questions: ['yes', '3', 'ä: #b', '']}",
        "prompt={kind: token-ids, tokens: {kind: lognormal, median: 9, sigma: 0.1}, vocabulary: 99}",
        "adapters={names: ['null', '1e3', base], kinds: [{method: ia3}, {rank: 8}]}",
        "tenants={a: {}, b: {output: {tokens: {kind: uniform, low: 1, high: 2}}, api_key_env: KEY}}",
        "uploads={count: 2, every_seconds: 3.5}",
        "slo={ttft_seconds: 0.1}",
    ],
)
def test_what_is_written_loads_again(spec: Path, tmp_path: Path, override: str) -> None:
    workload = load_workload(str(spec), overrides=[override])
    again = tmp_path / "again.yaml"
    again.write_text(dump_workload(workload), encoding="utf-8")
    assert load_workload(str(again)) == workload
