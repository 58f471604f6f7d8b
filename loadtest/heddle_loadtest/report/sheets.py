"""What a report says, as tables of text and sentences, made from a summary's JSON form. Knows no terminal and no HTML.

The terminal and the page show these same sheets, so that no number can differ between them and `summary.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heddle_loadtest.report import numbers
from heddle_loadtest.report.numbers import MISSING, amount, milliseconds, percent

Json = Mapping[str, Any]

_LATENCIES = {
    "time to first token": "ttft_seconds",
    "time per output token": "tpot_seconds",
    "between tokens": "inter_token_seconds",
    "end to end": "end_to_end_seconds",
}
_PERCENTILES = {"mean": "mean", "p50": "p50", "p90": "p90", "p99": "p99", "p99.9": "p99_9", "max": "max"}
_ROW_HEADS = ("ok", "failed", "tokens/s", "TTFT\np50 ms", "TTFT\np99 ms", "TPOT\np50 ms", "TPOT\np99 ms")
_TIER_NAMES = {"device": "on the device", "host": "in host memory", "disk": "on disk"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """One table."""

    name: str  # for programs
    title: str
    heads: tuple[str, ...]  # a newline in a head is where it breaks
    rows: tuple[tuple[str, ...], ...]  # the first cell of each names it
    note: str = ""  # what the table leaves out, or how to read it
    num_text_columns: int = 1  # so many columns from the left are text, the others numbers


def sheets_of(summary: Json, *, max_rows: int) -> Iterator[Sheet]:
    """The tables that this run has something for, in the order they are shown."""
    yield _latencies(summary["total"])
    if summary["adapters"]:
        yield _adapters(summary, max_rows)
    if summary["tenants"]:
        yield Sheet(name="tenants", title="By tenant", heads=("tenant", *_ROW_HEADS), rows=_rows(summary["tenants"]))
    if (temperature := summary["temperature"]) and temperature["tiers"]:
        yield _tiers(temperature)
    if len(summary["repeats"]) > 1:
        yield _repeats(summary)
    if summary["errors"]:
        yield _errors(summary)
    if (server := summary["server"]) and server["checks"]:
        yield _checks(server["checks"])


def headline(summary: Json) -> str:
    """What came through, in one line, with 95 % intervals where they are known."""
    total, intervals = summary["total"], summary["intervals"]
    tokens = numbers.bracketed(numbers.amount_between(intervals.get("output_tokens_per_second")))
    requests = numbers.bracketed(numbers.amount_between(intervals.get("requests_per_second")))
    interrupted = " (interrupted)" if summary["was_interrupted"] else ""
    abandoned = f", {total['num_abandoned']:,} abandoned" if total["num_abandoned"] else ""
    return (
        f"{total['num_ok']:,} ok, {total['num_failed']:,} failed{abandoned} "
        f"in {summary['elapsed_seconds']:.1f} s{interrupted}: "
        f"{amount(total['output_tokens_per_second'])} tokens/s{tokens}, "
        f"{amount(total['requests_per_second'])} requests/s{requests}"
    )


def sentences_of(summary: Json) -> Iterator[str]:
    """What is said in words: goodput, what TTFT was made of, fairness, uploads, the target's own counts, the client."""
    if goodput := summary["total"]["goodput"]:
        yield _goodput(goodput, summary["slo"])
    if parts := (summary["temperature"] or {}).get("parts"):
        yield (
            f"Of the mean time to first token of {milliseconds(parts['ttft_seconds'])} ms, "
            f"{percent(parts['queue_share'])} was waiting in the target's queue, "
            f"with {percent(parts['load_share'])} for adapters to be loaded."
        )
    for noun, key in (("adapters", "fairness_over_adapters"), ("tenants", "fairness_over_tenants")):
        if fairness := summary[key]:
            yield _fairness(fairness, noun)
    if uploads := summary["uploads"]:
        yield _uploads(uploads)
    if facts := list(_server_facts(summary["server"] or {})):
        yield f"The target says of itself: {', '.join(facts)}."
    if lag := summary["lag_seconds"]:
        yield f"The client sent its requests {milliseconds(lag['p99'])} ms late or less (p99)."


def slo_text(slo: Json) -> str:
    """The service level as people say it."""
    names = {"ttft_seconds": "TTFT", "tpot_seconds": "TPOT", "end_to_end_seconds": "end to end"}
    limits = [f"{name} ≤ {slo[key] * 1000:g} ms" for key, name in names.items() if slo.get(key) is not None]
    return ", ".join(limits) or "any answer"


def _latencies(total: Json) -> Sheet:
    return Sheet(
        name="latency",
        title="Percentiles",
        heads=("milliseconds", *_PERCENTILES),
        rows=tuple(
            (name, *(milliseconds((total[key] or {}).get(column)) for column in _PERCENTILES.values()))
            for name, key in _LATENCIES.items()
        ),
        note="From the time each request was due; of the requests that succeeded.",
    )


def _adapters(summary: Json, max_rows: int) -> Sheet:
    rows = _rows(summary["adapters"])[:max_rows]
    num_more = summary["num_adapters"] - len(rows)
    return Sheet(
        name="adapters",
        title="By adapter",
        heads=("adapter", *_ROW_HEADS),
        rows=rows,
        note=f"The {len(rows)} most asked for, and {num_more:,} more." if num_more else "",
    )


def _rows(groups: Mapping[str, Json]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            name,
            f"{row['num_ok']:,}",
            f"{row['num_failed']:,}",
            amount(row["output_tokens_per_second"]),
            *_p50_and_p99(row["ttft_seconds"]),
            *_p50_and_p99(row["tpot_seconds"]),
        )
        for name, row in groups.items()
    )


def _tiers(temperature: Json) -> Sheet:
    groups = {_TIER_NAMES.get(name, name): row for name, row in temperature["tiers"].items()}
    shares = {_TIER_NAMES.get(name, name): share for name, share in temperature["hit_rates"].items()}
    groups |= {"all warm": temperature["warm"], "all cold": temperature["cold"]}
    return Sheet(
        name="tiers",
        title="By where the adapter was",
        heads=("adapter was", "ok", "share", "TTFT\np50 ms", "TTFT\np99 ms", "TPOT\np50 ms", "TPOT\np99 ms"),
        rows=tuple(
            (
                name,
                f"{row['num_ok']:,}",
                percent(shares.get(name)),
                *_p50_and_p99(row["ttft_seconds"]),
                *_p50_and_p99(row["tpot_seconds"]),
            )
            for name, row in groups.items()
        ),
        note="When its request came; warm is on the device. Of requests whose reply says so.",
    )


def _repeats(summary: Json) -> Sheet:
    return Sheet(
        name="repeats",
        title="By repeat",
        heads=("seed", "seconds", "ok", "failed", "requests\ndue/s", "requests\nok/s", "tokens/s", "client\nCPU"),
        rows=tuple(
            (
                str(repeat["seed"]),
                f"{repeat['elapsed_seconds']:.1f}",
                f"{repeat['num_ok']:,}",
                f"{repeat['num_failed']:,}",
                amount(repeat["offered_requests_per_second"]),
                amount(repeat["requests_per_second"]),
                amount(repeat["output_tokens_per_second"]),
                percent(repeat["client_cpu_share"]),
            )
            for repeat in summary["repeats"]
        ),
    )


def _errors(summary: Json) -> Sheet:
    return Sheet(
        name="errors",
        title="Failed requests, by code",
        heads=("error", "first message", "count"),
        rows=tuple(
            (code, summary["error_examples"].get(code, MISSING), f"{count:,}")
            for code, count in summary["errors"].items()
        ),
        num_text_columns=2,
    )


def _checks(checks: Sequence[Json]) -> Sheet:
    return Sheet(
        name="server",
        title="What client and target both counted",
        heads=("number", "client", "target", "difference", "verdict"),
        rows=tuple(
            (
                check["name"],
                *(_count_or_time(check["name"], check[side]) for side in ("client", "server")),
                percent(check["relative_difference"]),
                "agree" if check["is_within_tolerance"] else "DIFFER",
            )
            for check in checks
        ),
    )


def _count_or_time(name: str, value: float) -> str:
    return f"{milliseconds(value)} ms" if "time" in name else f"{value:,.0f}"


def _server_facts(server: Json) -> Iterator[str]:
    if server.get("num_steps"):
        yield (
            f"{server['num_steps']:,.0f} steps of {amount(server['segments_per_step'])} adapters and "
            f"{amount(server['tokens_per_step'])} tokens each"
        )
    if hits := server.get("hits_by_tier"):
        yield f"adapters found {_by_tier(hits)}"
    if server.get("num_adapter_loads") is not None:
        num_bytes = sum(server["adapter_load_bytes"].values())
        yield f"{server['num_adapter_loads']:,.0f} adapter loads ({num_bytes / 2**20:,.1f} MiB)"
    if evictions := server.get("adapter_evictions"):
        yield f"adapters dropped that were {_by_tier(evictions)}"
    if server.get("num_preemptions") is not None:
        yield f"{server['num_preemptions']:,.0f} preemptions"
    if server.get("prefix_hit_rate") is not None:
        yield f"{percent(server['prefix_hit_rate'])} of prompt tokens from the prefix cache"


def _by_tier(counts: Mapping[str, float]) -> str:
    ordered = [tier for tier in _TIER_NAMES if tier in counts] + [tier for tier in counts if tier not in _TIER_NAMES]
    return ", ".join(f"{counts[tier]:,.0f} {_TIER_NAMES.get(tier, tier)}" for tier in ordered)


def _goodput(goodput: Json, slo: Json) -> str:
    return (
        f"Goodput ({slo_text(slo)}): {percent(goodput['share'])} of {goodput['num_requests']:,} requests"
        f"{numbers.bracketed(numbers.percent_between(goodput['share_interval']))}, "
        f"{amount(goodput['requests_per_second'])} requests/s."
    )


def _fairness(fairness: Json, noun: str) -> str:
    slowest, fastest = fairness["slowest"], fairness["fastest"]
    extremes = (
        f"; slowest {slowest['name']} ({amount(slowest['relative_speed'])} of the run's average speed), "
        f"fastest {fastest['name']} ({amount(fastest['relative_speed'])})"
        if slowest and fastest
        else ""
    )
    return (
        f"Fairness over {fairness['count']:,} {noun} (Jain, 1 is even): "
        f"answered {_index(fairness['answered'])}, speed {_index(fairness['speed'])}{extremes}."
    )


def _uploads(uploads: Json) -> str:
    failed = f", {uploads['num_failed']:,} failed ({uploads['error_example']})" if uploads["num_failed"] else ""
    took = uploads["seconds"]
    times = f"; p50 {milliseconds(took['p50'])} ms, p99 {milliseconds(took['p99'])} ms" if took else ""
    return f"Uploads during the run: {uploads['num_ok']:,} ok{failed}{times}."


def _index(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _p50_and_p99(values: Json | None) -> tuple[str, str]:
    return (milliseconds(values["p50"]), milliseconds(values["p99"])) if values else (MISSING, MISSING)
