"""report.html: a run on one page that needs no network, no script and no other file. Computes nothing.

Names of adapters, messages of errors and the like come from outside: every text goes through `escape`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from heddle_loadtest.report import canvas, numbers
from heddle_loadtest.report.numbers import amount, milliseconds, percent
from heddle_loadtest.report.plots import NO_MATPLOTLIB, PLOTS, Plot, draw_plots, has_matplotlib
from heddle_loadtest.report.raw_files import write_text
from heddle_loadtest.report.sheets import Sheet, sentences_of, sheets_of, slo_text
from heddle_loadtest.report.stored_run import StoredRun

Json = Mapping[str, Any]

_MAX_ROWS = 50  # adapters in the table


@dataclass(frozen=True, slots=True)
class _Section:
    title: str
    plots: tuple[str, ...]
    sheets: tuple[str, ...]
    otherwise: str = ""  # what stands there if there is nothing else


_SECTIONS = (
    _Section("Latency", ("latency",), ("latency",)),
    _Section("Load over time", ("throughput",), ("repeats",)),
    _Section("Errors", (), ("errors",), "No request failed."),
    _Section("Warm and cold adapters", ("temperature",), ("tiers",)),
    _Section("Adapters and tenants", ("adapters",), ("adapters", "tenants")),
    _Section("The target's own numbers", ("residency",), ("server",)),
    _Section("The client itself", ("lag",), ()),
)


def write_page(run: StoredRun, path: Path) -> None:
    """Writes the page of `run`. Without matplotlib it has no plots, and says how to get them."""
    write_text(page_of(run), path)


def page_of(run: StoredRun) -> str:
    """The page as HTML."""
    style = (files(__package__) / "page.css").read_text(encoding="utf-8")
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(run.workload.name)}: heddle-loadtest</title>",
            f"<style>\n{style}</style>\n</head>\n<body>",
            *_head(run),
            "<main>",
            _cards(run.summary),
            *_words(run.summary),
            *_sections(run),
            *_sources(run),
            "</main>\n</body>\n</html>\n",
        )
    )


def _head(run: StoredRun) -> Iterator[str]:
    yield f"<header>\n<h1>{escape(run.workload.name)}</h1>"
    if run.workload.about:
        yield f"<p>{escape(run.workload.about)}</p>"
    for line in _about_run(run):
        yield f'<p class="soft">{escape(line)}</p>'
    yield _verdict(run.summary)
    yield from _warnings(run.summary)
    yield "</header>"


def _about_run(run: StoredRun) -> Iterator[str]:
    target, machine = run.environment.get("target") or {}, run.environment.get("machine") or {}
    model = f", model {target['model']}" if target.get("model") else ""
    yield f"{target.get('url', 'target unknown')} ({target.get('style', 'style unknown')}{model})"
    seeds = ", ".join(str(repeat["seed"]) for repeat in run.summary["repeats"])
    repeats = numbers.of_many(len(run.summary["repeats"]), "repeat")
    date = f"{run.environment['date']}, " if run.environment.get("date") else ""
    yield f"{date}{repeats} (seed {seeds}), {run.summary['elapsed_seconds']:.1f} s in all"
    if facts := list(_machine_facts(machine)):
        yield f"Client on {', '.join(facts)}"


def _machine_facts(machine: Json) -> Iterator[str]:
    """What is known of the client's machine."""
    if machine.get("cpu"):
        yield machine["cpu"]
    if machine.get("num_usable_cores"):
        yield numbers.of_many(machine["num_usable_cores"], "core")
    if machine.get("memory_bytes"):
        yield numbers.gibibytes(machine["memory_bytes"])
    if machine.get("system"):
        yield machine["system"]


def _verdict(summary: Json) -> str:
    if not summary["is_valid"]:
        kind, text, reasons = "bad", "Invalid: do not use these numbers.", summary["invalid_reasons"]
    elif not summary["is_publishable"]:
        kind, text, reasons = "doubt", "Valid, but not for publication.", summary["unpublishable_reasons"]
    else:
        kind, text, reasons = "good", "Valid, and fit for publication.", ()
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    listed = f"<ul>{items}</ul>" if items else ""
    return f'<div class="verdict {kind}" role="note"><strong>{text}</strong>{listed}</div>'


def _warnings(summary: Json) -> Iterator[str]:
    if summary["warnings"]:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in summary["warnings"])
        yield f'<div class="verdict doubt" role="note"><strong>To know beforehand.</strong><ul>{items}</ul></div>'


def _cards(summary: Json) -> str:
    cards = "\n".join(
        f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)} <span class="unit">{escape(unit)}</span></dd>'
        f'<dd class="interval">{escape(interval)}</dd></div>'
        for name, value, unit, interval in _headline_numbers(summary)
    )
    return f'<dl class="cards">\n{cards}\n</dl>\n<p class="note">{escape(_about_intervals(summary))}</p>'


def _about_intervals(summary: Json) -> str:
    """How to read what stands below the cards."""
    if len(summary["repeats"]) > 1:
        of_repeats = "over repeats and, within them, over requests and slices of time, widened as so few repeats demand"
    else:
        of_repeats = "over requests and slices of time; from a single repeat, it knows nothing of how runs differ"
    return (
        f"Intervals are 95 %. Of latencies and rates: bootstrap {of_repeats}. "
        "Of shares of requests: Wilson's, which takes each request as independent of the others."
    )


def _headline_numbers(summary: Json) -> Iterator[tuple[str, str, str, str]]:
    """Name, value, unit, what stands below."""
    total, intervals = summary["total"], summary["intervals"]
    for name, key, unit in (
        ("Output", "output_tokens_per_second", "tokens/s"),
        ("Answered", "requests_per_second", "requests/s"),
    ):
        yield name, amount(total[key]), unit, numbers.amount_between(intervals.get(key))
    for name, key, metric, column in (
        ("Time to first token, median", "ttft_seconds", "ttft_p50", "p50"),
        ("Time to first token, p99", "ttft_seconds", "ttft_p99", "p99"),
        ("Time per output token, median", "tpot_seconds", "tpot_p50", "p50"),
        ("End to end, p99", "end_to_end_seconds", "e2e_p99", "p99"),
    ):
        value = milliseconds((total[key] or {}).get(column))
        yield name, value, "ms", numbers.milliseconds_between(intervals.get(metric))
    if goodput := total["goodput"]:
        interval = numbers.percent_between(goodput["share_interval"])
        yield f"Goodput: {slo_text(summary['slo'])}", percent(goodput["share"]), "", interval
    ended = total["num_ok"] + total["num_failed"]
    failed = numbers.percent_between(total["error_rate_interval"] if ended else None)
    yield "Failed", f"{total['num_failed']:,}", f"of {numbers.of_many(ended, 'request')}", failed


def _words(summary: Json) -> Iterator[str]:
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences_of(summary))
    if items:
        yield f'<h2>In words</h2>\n<ul class="words">\n{items}\n</ul>'


def _sections(run: StoredRun) -> Iterator[str]:
    sheets = {sheet.name: sheet for sheet in sheets_of(run.summary, max_rows=_MAX_ROWS)}
    plots = dict(_plots(run))
    for section in _SECTIONS:
        parts = [plots[name] for name in section.plots]
        parts += [_table(sheets[name]) for name in section.sheets if name in sheets]
        if parts or section.otherwise:
            yield f"<section>\n<h2>{escape(section.title)}</h2>"
            yield "\n".join(parts) or f"<p>{escape(section.otherwise)}</p>"
            yield "</section>"


def _plots(run: StoredRun) -> Iterator[tuple[str, str]]:
    """The HTML of each plot, or why it is not there, by its name."""
    if not has_matplotlib():
        yield from ((plot.name, f'<p class="note">{escape(NO_MATPLOTLIB)}</p>') for plot in PLOTS)
        return
    for plot, figure in draw_plots(run):
        missing = f'<p class="note">No plot “{escape(plot.title)}”: {escape(plot.missing)}</p>'
        yield plot.name, missing if figure is None else _figure(plot, canvas.to_svg(figure))


def _figure(plot: Plot, svg: bytes) -> str:
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    alternative = escape(f"Plot. {plot.title}: {plot.caption.partition('. ')[0]}.")
    caption = f"<figcaption>{escape(plot.caption)}</figcaption>"
    return f'<figure>\n<img src="{source}" alt="{alternative}">\n{caption}\n</figure>'


def _table(sheet: Sheet) -> str:
    heads = "".join(
        f'<th scope="col"{_text_class(sheet, index)}>{escape(" ".join(head.split()))}</th>'
        for index, head in enumerate(sheet.heads)
    )
    rows = "\n".join(f"<tr>{_cells(sheet, row)}</tr>" for row in sheet.rows)
    note = f'\n<p class="note">{escape(sheet.note)}</p>' if sheet.note else ""
    return (
        f'<div class="table" role="region" aria-label="{escape(sheet.title)}" tabindex="0">\n'
        f'<table id="{sheet.name}">\n'
        f"<caption>{escape(sheet.title)}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n"
        f"</table>\n</div>{note}"
    )


def _cells(sheet: Sheet, row: Iterable[str]) -> str:
    name, *others = row
    cells = "".join(f"<td{_text_class(sheet, index)}>{escape(cell)}</td>" for index, cell in enumerate(others, start=1))
    return f'<th scope="row" class="text">{escape(name)}</th>{cells}'


def _text_class(sheet: Sheet, index: int) -> str:
    return ' class="text"' if index < sheet.num_text_columns else ""


def _sources(run: StoredRun) -> Iterator[str]:
    from heddle_loadtest.workload.spec_file import dump_workload

    yield "<section>\n<h2>What was run, and where</h2>"
    yield _details("Workload", dump_workload(run.workload))
    yield _details("Environment", _indented(run.environment))
    yield _details("All numbers (summary.json)", _indented(run.summary))
    yield "</section>"


def _details(title: str, text: str) -> str:
    return f"<details>\n<summary>{escape(title)}</summary>\n<pre>{escape(text)}</pre>\n</details>"


def _indented(value: Json) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
