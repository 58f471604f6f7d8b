"""The snippets of docs/clients.md, to be run as they stand there: against another address, and nothing else changed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "clients.md"
ADDRESS = "http://127.0.0.1:8000"
_SECTION = re.compile(r"^## (?P<title>.+?)\n(?P<text>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_SNIPPET = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```$)?", re.M | re.S)


@dataclass(frozen=True)
class Snippet:
    """A piece of code, and what the page says that it prints."""

    language: str
    code: str
    output: str | None

    def at(self, address: str) -> str:
        """The code for the server at this address."""
        return self.code.replace(ADDRESS, address)


def snippets(title: str) -> list[Snippet]:
    """Those of the section with this title, in their order."""
    (text,) = (section["text"] for section in _SECTION.finditer(PAGE.read_text()) if section["title"] == title)
    found = [Snippet(*match.group("language", "code", "output")) for match in _SNIPPET.finditer(text)]
    assert found, f"the section {title!r} has no snippets"
    return found
