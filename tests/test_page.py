"""The playground's files: how they are served, that they agree with each other, and what they never do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from heddle_server.api import page_routes

FOLDER = Path(page_routes.__file__).parent / "page"
MEDIA_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
PARTS = sorted(file.name for file in FOLDER.iterdir() if file.name != "index.html")
MODULES = [name for name in PARTS if name.endswith(".js")]
SHEETS = [name for name in PARTS if name.endswith(".css")]
ENTRIES = {"theme.js", "main.js"}  # what index.html loads; the rest is imported
SVG_NAMESPACE = "http://www.w3.org/2000/svg"  # a name that is never fetched
FIELDS = {"input", "select", "textarea"}

TEXT_CONTRAST = 4.5  # WCAG 2.2, 1.4.3


class Page(HTMLParser):
    """Everything that the tests want to know about the markup."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.classes: set[str] = set()
        self.references: list[str] = []  # what src and href name
        self.labelled: set[str] = set()  # ids that a label is for
        self.unlabelled: set[str] = set()  # ids of fields that lie in no label
        self.described_by: set[str] = set()  # ids that name or describe an element
        self.inline: list[str] = []  # what the content security policy forbids
        self._num_open_labels = 0
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.classes |= set(attributes.get("class", "").split())
        self.references += [attributes[name] for name in ("src", "href", "action") if name in attributes]
        self.described_by |= {
            attributes[name] for name in ("aria-describedby", "aria-labelledby") if name in attributes
        }
        self.inline += [name for name in attributes if name == "style" or name.startswith("on")]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in attributes) else []
        if tag == "label":
            self._num_open_labels += 1
            self.labelled |= {attributes["for"]} if "for" in attributes else set()
        if tag in FIELDS and not self._num_open_labels:
            self.unlabelled.add(attributes.get("id", tag))

    def handle_endtag(self, tag: str) -> None:
        self._num_open_labels -= tag == "label"


def source(name: str) -> str:
    return (FOLDER / name).read_text()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(page_routes.router)
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(source("index.html"))


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in PARTS)])
def test_each_file_is_served_as_what_it_is(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.text == source(Path(path).name or "index.html")
    assert response.headers["content-type"] == MEDIA_TYPES.get(Path(path).suffix, "text/html; charset=utf-8")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/index.html",
        "/page/../page_routes.py",
        "/page/%2e%2e/app.py",
        "/page/%2e%2e%2fapp.py",
        "/page/..%5capp.py",
        "/page/%2fetc%2fpasswd",
        "/page/main.js%00",
        "/page/MAIN.JS",
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_icon_is_there_for_browsers_that_ask_unasked(client: TestClient) -> None:
    response = client.get("/favicon.ico")
    assert (response.status_code, response.headers["content-type"]) == (200, "image/svg+xml")


def test_the_api_schema_does_not_list_the_page(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}


def test_the_page_refers_to_its_own_files_only(page: Page) -> None:
    assert {"docs", *(f"page/{name}" for name in [*ENTRIES, *SHEETS, "icon.svg"])} == set(page.references)
    for name in ["index.html", *PARTS]:
        text = source(name).replace(SVG_NAMESPACE, "")
        assert not re.search(r"https?:|//[\w-]+\.\w|@import|url\(", text), name


def test_the_page_obeys_its_own_security_policy(page: Page) -> None:
    assert page.inline == []
    for name in MODULES:
        assert not re.search(r"""["']style["']|new Function|\beval\b""", source(name)), name


def test_no_module_makes_html_of_text() -> None:
    for name in MODULES:
        found = re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc", source(name))
        assert not found, name


def test_every_import_is_there_and_every_module_is_used() -> None:
    imported = set[str]()
    for name in MODULES:
        for names, module in re.findall(r'import \{([^}]+)\} from "\./([\w.]+)";', source(name)):
            imported.add(module)
            exported = set(re.findall(r"export (?:async )?(?:class|const|function\*?) (\w+)", source(module)))
            assert {each.strip() for each in names.split(",")} <= exported, f"{name} imports from {module}"
    assert imported | ENTRIES == set(MODULES)


def test_every_export_is_used_somewhere() -> None:
    for module in MODULES:
        for exported in re.findall(r"export (?:async )?(?:class|const|function\*?) (\w+)", source(module)):
            others = "".join(source(name) for name in MODULES if name != module)
            assert re.search(rf"\b{exported}\b", others), f"nobody imports {exported} of {module}"


def test_every_id_that_a_script_uses_is_in_the_page(page: Page) -> None:
    asked = re.compile(r"""(?:getElementById|byId)\("([\w-]+)"\)|#part\("#([\w-]+)""")
    used = {first or second for name in MODULES for first, second in asked.findall(source(name))}
    assert len(used) > 20
    assert used <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_every_style_is_of_something_that_exists(page: Page) -> None:
    scripts = "".join(source(name) for name in MODULES)
    for name in SHEETS:
        selectors = re.sub(r"/\*.*?\*/|\{[^{}]*\}", " ", source(name), flags=re.DOTALL)
        for each in re.findall(r"\.([a-z][\w-]*)", selectors):
            assert each in page.classes or re.search(rf"\b{each}\b", scripts), f"{name} styles .{each}"
        for each in re.findall(r"#([a-z][\w-]*)", selectors):
            assert each in page.ids, f"{name} styles #{each}"


def test_every_field_has_a_label_and_every_description_exists(page: Page) -> None:
    assert page.unlabelled
    assert page.unlabelled <= page.labelled <= set(page.ids)
    assert page.described_by <= set(page.ids)


def test_every_colour_is_one_of_the_theme() -> None:
    defined = set(re.findall(r"^  (--[\w-]+): ", source("theme.css"), re.MULTILINE))
    used = {name for sheet in SHEETS for name in re.findall(r"var\((--[\w-]+)\)", source(sheet))}
    assert used - {"--share"} == defined  # a bar's length is set by the script
    for sheet in SHEETS:
        assert sheet == "theme.css" or not re.search(r"#[0-9a-f]{3,6}\b", re.sub(r"#[\w-]+[^{;]*\{", "", source(sheet)))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_what_lies_behind_it(theme: str) -> None:
    colours = theme_colours(theme)
    texts = ["text", "muted", "accent", "error", "warm", "device", "host", "disk"]
    pairs = [*product(texts, ["surface", "raised"]), *product(["text", "muted", "error"], ["ground"])]
    pairs += [("on-accent", "accent"), *(("text", f"heat-{number}") for number in range(1, 5))]
    too_weak = {pair for pair in pairs if contrast(colours[pair[0]], colours[pair[1]]) < TEXT_CONTRAST}
    assert not too_weak


def theme_colours(theme: str) -> dict[str, str]:
    found = re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\);", source("theme.css"))
    assert found
    return {name: light if theme == "light" else dark for name, light, dark in found}


def contrast(first: str, second: str) -> float:
    """The ratio of WCAG 2.2, 1.4.3: from 1 to 21."""
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
