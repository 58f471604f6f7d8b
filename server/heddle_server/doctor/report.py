"""The doctor's findings for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from heddle_server.doctor.check import Check
from heddle_server.server_address import printable

_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
NAME_WIDTH = 16


def print_checks(checks: Iterable[Check], console: Console) -> list[Check]:
    """Each as soon as it is there; returns them."""
    done = list[Check]()
    for check in checks:
        line = Text.assemble((f"{check.status:<5}", _STYLES[check.status]), f"{printable(check.name):<{NAME_WIDTH}} ")
        console.print(line.append(printable(check.found)), soft_wrap=True)
        if check.remedy:
            console.print(Text(f"{'':<{5 + NAME_WIDTH}} {check.remedy}", style="dim"), soft_wrap=True)
        done.append(check)
    return done
