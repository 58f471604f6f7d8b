"""The tables of docs/performance.md as Markdown, each from the result folders of its measurement. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from heddle_demo.bench.load.cell_numbers import CellNumbers
from heddle_demo.bench.load.cold_table import PLACES
from heddle_demo.bench.load.punica_table import VARIANTS
from heddle_demo.bench.load.servers import BASELINES, HEDDLE
from heddle_demo.bench.load.slora_table import POPULARITIES, SIZES
from heddle_demo.bench.load.sweep_table import WINDOW_SECONDS

BOOTSTRAP = "95 % bootstrap intervals over rounds and requests, widened for so few rounds"
WILSON = "95 % Wilson intervals"
TITLES = {
    "peft-mixed": "PEFT, mixed batches",
    "peft-grouped": "PEFT, adapter by adapter",
    "transformers-cb-grouped": "transformers' continuous batching, adapter by adapter",
}


def punica(folder: Path) -> str:
    """Output tokens per second of every server, by popularity."""
    servers = [name for name in (HEDDLE, *BASELINES) if (folder / name).is_dir()]
    headings = ["adapters asked for", "segments a step", *servers, "heddle over the best other"]
    rows = []
    for variant in VARIANTS:
        cells = {name: CellNumbers.read(folder / name / variant) for name in servers}
        ours, others = cells[HEDDLE], [cells[name] for name in servers if name != HEDDLE]
        best = max(others, key=lambda cell: median(cell.rates("output_tokens_per_second")))
        tokens = [_marked(cell, cell.with_interval("output_tokens_per_second", 0)) for cell in cells.values()]
        rows.append([variant, _num_adapters(ours), _segments(ours), *tokens, _ratio_by_rounds(ours, best)])
    names = [TITLES.get(heading, heading) for heading in headings]
    return (
        _table(["popularity", *names], rows)
        + _provenance(folder / HEDDLE / VARIANTS[0], BOOTSTRAP)
        + _fewer(folder, servers)
    )


def slora(folder: Path) -> str:
    """Throughput and first tokens by the number of registered adapters."""
    rows = []
    for size in SIZES:
        for popularity in POPULARITIES:
            path = folder / f"n{size}{popularity}"
            if not path.is_dir():
                continue
            cell = CellNumbers.read(path)
            goodput = cell.total["goodput"]
            rows.append(
                [
                    f"{size:,}",
                    "power 0.3" if popularity else "uniform",
                    _marked(cell, cell.with_interval("requests_per_second")),
                    f"{_ms(cell.latency_ms('ttft', 'p50'))} / {_ms(cell.latency_ms('ttft', 'p90'))}",
                    f"{goodput['share']:.0%}",
                    " / ".join(_percent(cell.hit_share(tier)) for tier in PLACES),
                    _loaded(cell),
                    _segments(cell),
                ]
            )
    headings = [
        "registered",
        "popularity",
        "requests/s",
        "TTFT p50 / p90 ms",
        "first token within 6 s",
        "found on device / host / disk",
        "loaded a request",
        "segments a step",
    ]
    return _table(headings, rows) + _provenance(folder / f"n{SIZES[0]}", BOOTSTRAP)


def cold(folder: Path) -> str:
    """Latencies by where requests found their adapters."""
    cells = {place: CellNumbers.read(folder / place) for place in PLACES}
    rows = [
        [
            place,
            " / ".join(_percent(cell.hit_share(tier)) for tier in PLACES),
            *(cell.with_interval(metric, scale=1000) for metric in ("ttft_p50", "tpot_p50", "e2e_p50")),
            _marked(cell, _ms(cell.latency_ms("ttft", "p99"))),
        ]
        for place, cell in cells.items()
    ]
    headings = [
        "adapters come from",
        "found on device / host / disk",
        "TTFT p50 ms",
        "per token p50 ms",
        "end to end p50 ms",
        "TTFT p99 ms",
    ]
    return _table(headings, rows) + _provenance(folder / "device", BOOTSTRAP)


def sweep(folder: Path) -> str:
    """Goodput by offered load."""
    capacity = CellNumbers.read(folder / "capacity")
    paths = sorted(folder.glob("load-*"), key=lambda path: float(path.name.removeprefix("load-")))
    slo = CellNumbers.read(paths[0]).summary["slo"]
    rows = []
    for path in paths:
        cell = CellNumbers.read(path)
        goodput = cell.total["goodput"]
        low, high = goodput["share_interval"]
        rows.append(
            [
                f"{path.name.removeprefix('load-')}x",
                f"{median(cell.rates('offered_requests_per_second')):.1f}",
                _marked(cell, f"{cell.total['requests_per_second']:.1f}"),
                f"{cell.summary['errors'].get('overloaded', 0) / goodput['num_requests']:.0%}",
                f"{goodput['share']:.0%} [{low:.0%}, {high:.0%}]",
                f"{goodput['requests_per_second']:.1f}",
                f"{_ms(cell.latency_ms('ttft', 'p50'))} / {_ms(cell.latency_ms('ttft', 'p99'))}",
                _ms(cell.latency_ms("tpot", "p50")),
            ]
        )
    headings = [
        "of the capacity",
        "offered requests/s",
        "answered",
        "refused",
        "kept the level",
        "of these, requests/s",
        "TTFT p50 / p99 ms",
        "per token p50 ms",
    ]
    rate = _marked(capacity, capacity.with_interval("requests_per_second"))
    level = (
        f"Capacity, in a closed loop of 128 streams: {rate} requests/s. The level: first token within "
        f"{slo['ttft_seconds']:g} s, and {slo['tpot_seconds'] * 1000:.0f} ms a token.\n\n"
    )
    source = _provenance(folder / "capacity", f"then windows of {WINDOW_SECONDS:.0f} s; {WILSON}")
    return level + _table(headings, rows) + source


TABLES: dict[str, Callable[[Path], str]] = {"punica": punica, "slora": slora, "cold": cold, "sweep": sweep}


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _provenance(path: Path, intervals: str) -> str:
    cell = CellNumbers.read(path)
    environment, machine = cell.environment, cell.environment["machine"]
    return (
        f"\n{environment['date'][:10]}, {machine['num_cores']} cores of {machine['cpu']}, revision "
        f"{environment['git_revision']}; {len(cell.summary['repeats'])} rounds of {cell.num_requests} "
        f"requests; {intervals}.\n"
    )


def _fewer(folder: Path, servers: Sequence[str]) -> str:
    """Which servers were asked less than heddle."""
    numbers = {name: CellNumbers.read(folder / name / VARIANTS[-1]).num_requests for name in servers}
    fewer = [
        f"{TITLES[name]} with {number} requests a round" for name, number in numbers.items() if number < numbers[HEDDLE]
    ]
    return f"Measured on a subset: {'; '.join(fewer)}.\n" if fewer else ""


def _ratio_by_rounds(ours: CellNumbers, other: CellNumbers) -> str:
    """Median and range over the rounds: both were measured in each of them, minutes apart."""
    pairs = zip(ours.rates("output_tokens_per_second"), other.rates("output_tokens_per_second"), strict=True)
    ratios = [mine / theirs for mine, theirs in pairs]
    return f"{median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"


def _marked(cell: CellNumbers, text: str) -> str:
    """Says so where the load generator itself was what limited a run."""
    return text if cell.summary["is_valid"] else f"{text} (client at its limit)"


def _num_adapters(cell: CellNumbers) -> str:
    return str(cell.summary["num_adapters"] - ("base" in cell.summary["adapters"]))


def _segments(cell: CellNumbers) -> str:
    server = cell.summary["server"]
    return "-" if server is None or server["segments_per_step"] is None else f"{server['segments_per_step']:.1f}"


def _loaded(cell: CellNumbers) -> str:
    """To the device, for a request on average."""
    loaded_bytes = cell.summary["server"]["adapter_load_bytes"].get("host", 0.0)
    num_requests = cell.num_requests * len(cell.summary["repeats"])
    return f"{loaded_bytes / num_requests / 1024:,.0f} KiB"


def _ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:,.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
