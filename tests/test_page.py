"""The page at `/`: its three files as they are served, and that they agree with each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from heddle_server.api import page_routes

CONTENT_TYPES = {
    "/": "text/html; charset=utf-8",
    "/page/page.js": "text/javascript; charset=utf-8",
    "/page/page.css": "text/css; charset=utf-8",
}
FIELDS = {"input", "select", "textarea"}


class Page(HTMLParser):
    """Everything that the tests want to know about the markup."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.classes: set[str] = set()
        self.references: list[str] = []  # what src and href name
        self.labelled: set[str] = set()  # ids that a label is for
        self.unlabelled: set[str] = set()  # ids of fields that lie in no label
        self.inline: list[str] = []  # what the content security policy forbids
        self._num_open_labels = 0
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.classes |= set(attributes.get("class", "").split())
        self.references += [attributes[name] for name in ("src", "href", "action") if name in attributes]
        self.inline += [name for name in attributes if name == "style" or name.startswith("on")]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in attributes) else []
        if tag == "label":
            self._num_open_labels += 1
            self.labelled |= {attributes["for"]} if "for" in attributes else set()
        if tag in FIELDS and not self._num_open_labels:
            self.unlabelled.add(attributes.get("id", tag))

    def handle_endtag(self, tag: str) -> None:
        self._num_open_labels -= tag == "label"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(page_routes.router)
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def page(client: TestClient) -> Page:
    return Page(client.get("/").text)


@pytest.fixture(scope="module")
def script(client: TestClient) -> str:
    return client.get("/page/page.js").text


@pytest.mark.parametrize("path", CONTENT_TYPES)
def test_each_file_is_served_as_what_it_is(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.text
    assert response.headers["content-type"] == CONTENT_TYPES[path]
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["content-security-policy"] == "default-src 'self'"


@pytest.mark.parametrize("path", ["/page/", "/page/index.html", "/page/../page_routes.py", "/page/%2e%2e/app.py"])
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_missing_icon_is_no_error(client: TestClient) -> None:
    assert client.get("/favicon.ico").status_code == 204


def test_the_api_schema_does_not_list_the_page(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}


def test_the_page_refers_to_its_own_files_only(client: TestClient, page: Page) -> None:
    assert {f"/{reference}" for reference in page.references} == CONTENT_TYPES.keys() - {"/"}
    for path in CONTENT_TYPES:
        assert not re.search(r"https?:|//[\w-]+\.\w|@import|url\(|\bimport\b", client.get(path).text), path


def test_the_page_obeys_its_own_security_policy(page: Page) -> None:
    assert page.inline == []


def test_every_id_and_class_the_script_uses_is_in_the_page(page: Page, script: str) -> None:
    ids = re.findall(r"getElementById\((.*?)\)", script)
    parts = re.findall(r"\.part\((.*?)\)", script)
    assert ids
    assert parts
    assert {each.strip('"') for each in ids} <= set(page.ids)
    assert {each.strip('"') for each in parts} <= page.classes
    assert len(page.ids) == len(set(page.ids))


def test_the_script_builds_no_html_from_text(script: str) -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", script)


def test_every_field_has_a_label(page: Page) -> None:
    assert page.labelled
    assert page.unlabelled == page.labelled


def test_the_upload_form_has_the_parts_that_the_api_wants(client: TestClient) -> None:
    names = re.findall(r'<input id="upload-\w+" name="([^"]+)"', client.get("/").text)
    assert names == ["name", "adapter_config.json", "adapter_model.safetensors"]
