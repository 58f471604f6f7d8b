"""What a benchmark leaves for scripts: its last line, and a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def print_json_line(content: dict[str, Any], json_path: Path | None) -> None:
    """One line on standard output, and the same as a file that people can read."""
    if json_path is not None:
        write_json(content, json_path)
    print(json.dumps(content), flush=True)


def write_json(content: dict[str, Any], json_path: Path) -> None:
    """The file alone, its folder made if need be."""
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(content, indent=1) + "\n")
