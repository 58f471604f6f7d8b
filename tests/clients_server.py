"""What other people's clients are tried on: the demo's base, which here can be told to call tools, and its adapters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo_server import DemoServer, demo_server
from heddle_demo.data import ADAPTERS_DIR, BASE_DIR
from test_structured_output import TOOL_TEMPLATE

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
PIRATE = "Arrr! The capital of France be Paris, matey!"


@contextmanager
def clients_server(folder: Path) -> Iterator[DemoServer]:
    """In float32, where it answers as transformers does; its store and its log lie in `folder`."""
    base = shutil.copytree(BASE_DIR, folder / "base")
    template = base / "chat_template.jinja"
    template.write_text(TOOL_TEMPLATE + template.read_text())
    with demo_server(folder, base, model_name="base", adapters=ADAPTERS_DIR) as server:
        yield server


def is_city(value: Any) -> bool:
    """Whether it follows the schema that the clients ask for."""
    return set(value) == {"city", "big"} and len(value["city"]) <= 20 and isinstance(value["big"], bool)
