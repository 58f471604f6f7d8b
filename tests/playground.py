"""The playground in a real browser: what somebody sees of it and does with it."""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright's Python package")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("HEDDLE_SCREENSHOTS")  # a folder, for those who want the pictures of docs/
DESKTOP = {"width": 1600, "height": 1000}
PHONE = {"width": 360, "height": 740}
WAIT_MS = 15_000

DROP = """
({ files }) => {
  const transfer = new DataTransfer();
  for (const [name, content] of Object.entries(files)) {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], name));
  }
  const zone = document.querySelector(".drop");
  for (const type of ["dragover", "drop"]) {
    zone.dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
  }
}
"""


class Playground:
    """One tab."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.requests: list[dict[str, Any]] = []  # bodies of the chat requests that the page sent
        self.problems: list[str] = []  # what the browser complained of: exceptions, and violations of the page's policy
        tab.set_default_timeout(WAIT_MS)
        tab.on("pageerror", lambda error: self.problems.append(str(error)))
        tab.on("console", self._on_console)
        tab.on("request", self._on_request)

    def open(self, address: str) -> None:
        """Waits for the first panes."""
        self.tab.goto(address)
        self.tab.locator(".pane").nth(2).wait_for()

    def ask(self, question: str) -> list[str]:
        """The panes' answers, when all have ended."""
        self.tab.locator("#question").fill(question)
        self.tab.locator("#question").press("Enter")
        return self.answers()

    def answers(self) -> list[str]:
        """The panes' last answers, when all have ended."""
        self.tab.locator("#stop:disabled").wait_for()
        return [self.pane(number).locator(".answer").last.inner_text() for number in range(self.num_panes)]

    @property
    def num_panes(self) -> int:
        count: int = self.tab.locator(".pane").count()
        return count

    def pane(self, number: int) -> Any:
        return self.tab.locator(".pane").nth(number)

    def pick(self, number: int, name: str) -> None:
        """Chooses who answers in a pane, by keyboard."""
        self.pane(number).locator("button.chosen").press("Enter")
        self.pane(number).locator(".search").fill(name)
        self.pane(number).locator(f".options li[aria-selected=true] .name:text-is('{name}')").wait_for()
        self.tab.keyboard.press("Enter")

    def drop(self, files: Mapping[str, bytes]) -> None:
        """As if somebody had dragged files from a desktop onto the page."""
        self.tab.evaluate(DROP, {"files": {name: base64.b64encode(data).decode() for name, data in files.items()}})

    def parameter(self, name: str, value: str) -> None:
        self.tab.evaluate("document.getElementById('parameters').open = true")
        self.tab.locator(f"#field-{name}").fill(value)

    def copied(self, number: int, language: str) -> str:
        """What the clipboard holds after a pane's button was pressed."""
        self.pane(number).locator(f"[data-language={language}]").click()
        self.pane(number).locator(f"[data-language={language}]:text-is('copied')").wait_for()
        text: str = self.tab.evaluate("navigator.clipboard.readText()")
        return text

    def shows(self, selector: str, pattern: str) -> None:
        """Waits until an element's text is as the pattern says."""
        self.tab.locator(selector).filter(has_text=re.compile(f"^{pattern}$")).wait_for()

    def focused(self) -> str:
        """The focused element, in a word or two; "body" is none."""
        name: str = self.tab.evaluate(
            "() => { const e = document.activeElement; return e.id || e.classList[0] || e.tagName.toLowerCase(); }"
        )
        return name

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        pixels: int = self.tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        return pixels

    def picture(self, name: str, selector: str | None = None) -> None:
        """Keeps a picture for the docs, where somebody wants them."""
        if SCREENSHOTS:
            target = self.tab.locator(selector) if selector else self.tab
            target.screenshot(path=Path(SCREENSHOTS) / f"playground-{name}.png", animations="disabled", caret="hide")

    def _on_request(self, request: Any) -> None:
        if request.url.endswith("/chat/completions"):
            self.requests.append(request.post_data_json)

    def _on_console(self, message: Any) -> None:
        # A refusal by the server is what some tests ask for; the browser notes each.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(message.text)


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's own browser, without a window."""
    with playwright.sync_playwright() as driver:
        # The sandbox needs rights that containers do not give; nothing but our own page is loaded.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def playground(browser: Any, **options: Any) -> Iterator[Playground]:
    """A fresh tab that has stored nothing; fails if the browser complained of anything."""
    context = browser.new_context(viewport=options.pop("viewport", DESKTOP), **options)
    try:
        tab = Playground(context.new_page())
        yield tab
        assert tab.problems == []
    finally:
        context.close()
