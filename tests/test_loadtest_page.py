"""report.html: whole, self-contained, true to summary.json, and safe whatever names the target has."""

from __future__ import annotations

import base64
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from heddle_loadtest.client.result import RequestError
from heddle_loadtest.commands.report import report
from heddle_loadtest.measure.summary import summarize
from heddle_loadtest.report.folder import ResultFolder, read_run
from heddle_loadtest.report.numbers import amount, milliseconds, percent
from heddle_loadtest.report.page import page_of
from heddle_loadtest.report.plots import PLOTS
from heddle_loadtest.report.stored_run import StoredRun
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Adapters, Poisson, Workload
from heddle_loadtest.workload.spec_file import dump_workload
from loadtest_runs import ENVIRONMENT, WORKLOAD, make_repeat, make_run, stored
from loadtest_samples import make_cached_result, make_outcome, make_result

VOID = {"meta", "img", "br", "hr", "link", "input", "base", "embed", "source"}
LOADING = {"src", "srcset", "href", "action", "data", "poster", "background", "xlink:href", "formaction"}


class Page(HTMLParser):
    """Elements with their attributes, tables as lists of rows of cells, all text; every end tag must match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: list[tuple[str, str]] = []  # with the classes and names of the innermost element
        self._open: list[tuple[str, str]] = []
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes.get("class") or ""))
        if tag == "table":
            self._rows = self.tables[str(attributes["id"])] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, name = self._open[-1] if self._open else ("", "")
        self.texts.append((name or tag, data))
        if tag in ("td", "th"):
            self._rows[-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(data for _, data in self.texts)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run() -> StoredRun:
    return make_run(num_requests=120)


@pytest.fixture(scope="module")
def page(run: StoredRun) -> Page:
    return Page(page_of(run))


def test_nothing_is_loaded_from_anywhere(run: StoredRun) -> None:
    assert_loads_nothing(page_of(run))


def assert_loads_nothing(text: str) -> None:
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
        assert all(
            (attributes[name] or "").startswith("data:image/svg+xml;base64,") for name in LOADING & {*attributes}
        )
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    assert not re.search(r"url\(|@import|image-set|src\(", style)
    for image in page.of("img"):
        svg = base64.b64decode((image["src"] or "").partition(",")[2])
        for element in ElementTree.fromstring(svg).iter():
            for name, value in element.attrib.items():
                assert not name.endswith(("href", "src")) or value.startswith(("#", "data:image/png;base64,"))
                assert "url(" not in value or re.fullmatch(r".*url\(#[\w-]+\).*", value)


def test_every_plot_is_there_with_its_caption_and_its_text(page: Page) -> None:
    images = page.of("img")
    assert len(images) == len(PLOTS)
    for image, plot in zip(
        sorted(images, key=lambda image: image["alt"] or ""), sorted(PLOTS, key=lambda plot: plot.title), strict=True
    ):
        assert (image["alt"] or "").startswith(f"Plot. {plot.title}: ")
    assert all(plot.caption in page.text for plot in PLOTS)


def test_what_cannot_be_drawn_is_explained() -> None:
    page = Page(page_of(stored([make_outcome([make_result(0.0, 0.1)])])))
    drawn = " ".join(image["alt"] or "" for image in page.of("img"))
    for plot in PLOTS:
        assert (plot.title in drawn) != (plot.missing in page.text)


def test_without_matplotlib_it_says_what_to_install(run: StoredRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(page_of(run))
    assert not page.of("img")
    assert "pip install 'heddle[loadtest]'" in page.text
    assert page.tables["latency"]


def test_cards_hold_the_summarys_numbers(run: StoredRun, page: Page) -> None:
    total = run.summary["total"]
    values = [data.strip() for name, data in page.texts if name == "value" and data.strip()]
    assert values == [
        amount(total["output_tokens_per_second"]),
        amount(total["requests_per_second"]),
        milliseconds(total["ttft_seconds"]["p50"]),
        milliseconds(total["ttft_seconds"]["p99"]),
        milliseconds(total["tpot_seconds"]["p50"]),
        milliseconds(total["end_to_end_seconds"]["p99"]),
        percent(total["goodput"]["share"]),
        str(total["num_failed"]),
    ]
    low, high = run.summary["intervals"]["ttft_p50"]
    assert f"{low * 1000:.1f} to {high * 1000:.1f}" in [data for name, data in page.texts if name == "interval"]


def test_tables_hold_the_summarys_numbers(run: StoredRun, page: Page) -> None:
    keys = ("ttft_seconds", "tpot_seconds", "inter_token_seconds", "end_to_end_seconds")
    for key, row in zip(keys, page.tables["latency"][1:], strict=True):
        values = run.summary["total"][key]
        expected = [values[name] * 1000 for name in ("mean", "p50", "p90", "p99", "p99_9", "max")]
        assert [float(cell.replace(",", "")) for cell in row[1:]] == pytest.approx(expected, rel=0.02)
    for name, ok, failed, *_ in page.tables["adapters"][1:]:
        row = run.summary["adapters"][name]
        assert (int(ok), int(failed)) == (row["num_ok"], row["num_failed"])
    assert {row[0] for row in page.tables["tenants"][1:]} == set(run.summary["tenants"])
    assert [row[0] for row in page.tables["repeats"][1:]] == ["0", "1", "2"]
    assert page.tables["errors"][1][::2] == ["queue_full", str(run.summary["errors"]["queue_full"])]


def test_the_sources_are_on_the_page(run: StoredRun, page: Page) -> None:
    environment, *others = [data for name, data in page.texts if name == "pre" and data.startswith("{")]
    assert json.loads(environment) == ENVIRONMENT
    assert json.loads(others[0]) == json.loads(json.dumps(run.summary))
    assert dump_workload(WORKLOAD) in page.text


@pytest.mark.parametrize(
    ("outcomes", "words"),
    [
        ([make_repeat(seed, 60) for seed in range(3)], ["Valid, and fit for publication."]),
        ([make_repeat(0, 60)], ["Valid, but not for publication.", "A published figure needs 3 repeats"]),
        ([make_outcome([make_result(0.0, 1.0, lag=0.5)])], ["Invalid: do not use these numbers.", "dispatch lag p99"]),
        ([make_outcome([])], ["Invalid: do not use these numbers.", "Not one request succeeded."]),
    ],
)
def test_the_verdict_and_its_reasons_come_first(
    outcomes: list[Outcome], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its plots take a second
    text = Page(page_of(stored(outcomes))).text.split("Latency")[0]
    assert all(word in text for word in words)


def test_warnings_and_how_to_read_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = make_outcome([make_result(float(at), at + 0.5, num_prompt_tokens=None) for at in range(3)])
    one, three = (Page(page_of(stored([outcome] * count))).text for count in (1, 3))
    assert "3 of 3 answers came without usage" in one
    assert "To know beforehand." in one
    assert "To know beforehand." not in Page(page_of(stored([make_repeat(0, 60)]))).text
    assert "it knows nothing of how runs differ" in one
    assert "it knows nothing of how runs differ" not in three
    assert "Wilson's" in three


def test_failed_requests_have_an_interval(page: Page, run: StoredRun) -> None:
    low, high = run.summary["total"]["error_rate_interval"]
    assert 0 < low < run.summary["total"]["error_rate"] < high
    assert f"{low * 100:.1f} to {high * 100:.1f} %" in [data for name, data in page.texts if name == "interval"]


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src="http://evil/x.png" onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</td></tr></table></style></title></pre></details>",
    "&lt;not an entity&gt; &amp;",
    "<!-- ]]> <![CDATA[",
    "$x^{y$ \\frac \x1b[31m\u202e",
    "http://evil/{}?%s",
)


def hostile_run() -> StoredRun:
    """Every text that comes from outside is hostile."""
    results = [
        result
        for index, text in enumerate(HOSTILE)
        for result in (
            make_cached_result(index, index + 0.1, cache=text, tenant=text),
            make_result(index, index + 0.1, 0.2 + index, adapter=text, tenant=text),
            make_result(index, adapter=text, tenant=text, error=RequestError(text, text)),
        )
    ]
    scrapes = [{f'heddle_pool_pages{{kind="{text}"}}': 1.0 for text in HOSTILE}] * 3
    scrapes[1] = scrapes[1] | {f'heddle_adapters_resident{{tier="{text}"}}': 1.0 for text in HOSTILE}
    workload = Workload(
        name="x", about=HOSTILE[0], requests=3, arrivals=Poisson(rate=1.0), adapters=Adapters(names=HOSTILE)
    )
    run = stored([make_outcome(results, scrapes=scrapes)], workload=workload)
    target = {"url": HOSTILE[1], "style": HOSTILE[2], "model": HOSTILE[3]}
    machine = {"cpu": HOSTILE[0], "system": HOSTILE[3]}
    run.environment.update(target=target, machine=machine, date=HOSTILE[3], command=HOSTILE[0])
    return run


def test_hostile_names_are_text() -> None:
    text = page_of(hostile_run())
    page = Page(text)
    assert_loads_nothing(text)
    assert [row[0] for row in page.tables["adapters"][1:]][1:] == list(HOSTILE)
    assert {(row[0], row[1]) for row in page.tables["errors"][1:]} == {(each, each) for each in HOSTILE}
    assert "<script" not in text
    assert all(image["src"] and image["src"].startswith("data:") for image in page.of("img"))


def test_structure_for_those_who_hear_the_page(page: Page) -> None:
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(headings))
    assert page.of("html") == [{"lang": "en"}]
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table")) == len(page.tables)
    assert len({attributes["id"] for attributes in page.of("table")}) == len(page.tables)
    assert all(attributes.get("alt") for attributes in page.of("img"))
    assert len(page.of("main")) == len(page.of("title")) == 1


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_all_text_has_the_contrast_that_wcag_asks_for() -> None:
    style = (files("heddle_loadtest.report") / "page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in style.split("@media (prefers")[:2])
    pairs = [(text, back) for text in ("ink", "soft", "accent") for back in ("page", "card")]
    pairs += [(kind, f"{kind}-card") for kind in ("good", "doubt", "bad")]
    pairs += [("ink", f"{kind}-card") for kind in ("good", "doubt", "bad")]
    for colours in (light, dark):
        for text, back in pairs:
            lighter, darker = sorted((luminance(colours[text]), luminance(colours[back])), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, back)


def write_folder(path: Path) -> None:
    """A run that was killed before its summary."""
    folder = ResultFolder.create(path)
    folder.write_workload(WORKLOAD)
    folder.write_environment(ENVIRONMENT)
    for repeat in range(2):
        folder.write_outcome(repeat, make_repeat(repeat, 60))


def test_the_command_makes_summary_page_and_plots_from_the_raw_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "run")
    app = typer.Typer()
    app.command()(report)
    done = CliRunner().invoke(app, [str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    run = read_run(tmp_path / "run")
    line = json.loads(done.stdout.splitlines()[-1])
    assert line == {name: run.summary[name] for name in line}
    assert run.summary["total"] == json.loads(json.dumps(summarize(WORKLOAD, run.outcomes).total.to_json()))
    assert Page((tmp_path / "run" / "report.html").read_text()).of("img")
    assert {file.stem for file in (tmp_path / "run").glob("*.png")} == {plot.name for plot in PLOTS}


def test_the_command_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    done = CliRunner().invoke(app, [str(tmp_path / "nowhere")])
    assert done.exit_code == 2
    assert "nowhere" in done.output
    assert "Traceback" not in done.output
