"""docs/methods.md: its table, made of what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heddle_demo.parity.measure import ALONE, CHUNKED, MIXED, RELOADED, WAYS, Errors, Measured

TABLE = re.compile(r"(<!-- table of methods -->\n).*?(<!-- end of table -->)", re.DOTALL)
HEADER = (
    "| method | oracle | float32: "
    + " / ".join((ALONE, MIXED, CHUNKED, RELOADED))
    + " | effect | bfloat16, NF4: the same | bytes | PEFT's mixed batch |"
)


@dataclass(frozen=True)
class MethodResult:
    """One row of the table, as numbers."""

    name: str
    oracle: str
    fp32_errors: dict[str, float]  # by way: the largest, relative to max(1, |log-probability|)
    fp32_effect: float
    # By way: mean and 99th percentile of our error over PEFT's own; none where a quantised base refuses the method.
    bf16_ratios: dict[str, tuple[float, float]]
    bf16_effect_ratio: float | None  # mean effect over our mean error
    pool_bytes: int | None  # on the demo's base, of rows and vectors
    holds: bool  # every limit, in every way
    in_peft: str  # "right", "wrong", "refused" or "none"

    @classmethod
    def of(cls, name: str, oracle: str, exact: Measured, rounded: Measured, in_peft: str) -> MethodResult:
        fp32, bf16 = exact.errors[name], rounded.errors.get(name, {})
        return cls(
            name=name,
            oracle=oracle,
            fp32_errors={way: fp32[way].worst for way in WAYS},
            fp32_effect=fp32[ALONE].largest_effect,
            bf16_ratios={way: (errors.mean_ratio, errors.p99_ratio) for way, errors in bf16.items()},
            bf16_effect_ratio=bf16[ALONE].mean_effect_ratio if bf16 else None,
            pool_bytes=rounded.pool_bytes.get(name),
            holds=_all_hold(fp32, bf16),
            in_peft=in_peft,
        )

    @property
    def row(self) -> str:
        exact = " / ".join(f"{self.fp32_errors[way]:.0e}".replace("e-0", "e-") for way in WAYS)
        rounded = "refused on 4 bits"
        if self.bf16_ratios:
            worst = max(ratio for _, ratio in self.bf16_ratios.values())
            rounded = " / ".join(f"{self.bf16_ratios[way][0]:.2f}" for way in WAYS) + f" (p99 {worst:.2f})"
        pool = "" if self.pool_bytes is None else f"{self.pool_bytes:,}"
        marked = {"right": "right", "wrong": "**wrong, silently**", "refused": "refused", "none": ""}[self.in_peft]
        return (
            f"| {self.name}{'' if self.holds else ' **(a limit is broken)**'} | {self.oracle} | {exact} | "
            f"{self.fp32_effect:.2g} | {rounded} | {pool} | {marked} |"
        )


def _all_hold(fp32: Mapping[str, Errors], bf16: Mapping[str, Errors]) -> bool:
    return all(errors.holds_fp32 for errors in fp32.values()) and all(errors.holds_bf16 for errors in bf16.values())


def table_of(results: Sequence[MethodResult]) -> str:
    return "\n".join([HEADER, "|---" * 7 + "|", *(result.row for result in results)]) + "\n"


def rewrite_page(page: Path, results: Sequence[MethodResult]) -> str:
    """The page with its table made anew."""
    return TABLE.sub(lambda match: match[1] + table_of(results) + match[2], page.read_text())


def save_results(path: Path, machine: Mapping[str, Any], results: Sequence[MethodResult]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "methods": [vars(result) for result in results]}, indent=1) + "\n")


def load_results(path: Path) -> list[MethodResult]:
    described = json.loads(path.read_text())["methods"]
    return [
        MethodResult(**{**each, "bf16_ratios": {way: tuple(pair) for way, pair in each["bf16_ratios"].items()}})
        for each in described
    ]
