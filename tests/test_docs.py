"""/docs: the API's viewer, served with all that it needs, in a real browser without any other host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from heddle_server.api import docs_routes
from live_server import live_server, server_config
from playground import CHROMIUM, chromium, playground
from tenant_keys import make_key

PARTS = {
    "/docs": "text/html",
    "/docs/viewer.js": "text/javascript",
    "/docs/swagger-ui-bundle.js": "text/javascript",
    "/docs/swagger-ui.css": "text/css",
}


@pytest.fixture(scope="module")
def files() -> Iterator[TestClient]:
    app = FastAPI(openapi_url=None)
    app.include_router(docs_routes.router)
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize("path", PARTS)
def test_each_file_is_served_as_what_it_is(files: TestClient, path: str) -> None:
    response = files.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == f"{PARTS[path]}; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "path",
    ["/docs/index.html", "/docs/redoc.standalone.js", "/docs/../app.py", "/docs/%2e%2e/app.py", "/docs/viewer.js%00"],
)
def test_nothing_else_is_served(files: TestClient, path: str) -> None:
    assert files.get(path).status_code == 404


def test_the_page_loads_its_own_files_only(files: TestClient) -> None:
    named = re.findall(r'(?:src|href)="([^"]+)"', files.get("/docs").text)
    assert {f"/{name}" for name in named} == {*PARTS, "/page/icon.svg"} - {"/docs"}
    assert "//" not in files.get("/docs/viewer.js").text.replace("// ", "")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: sudo apt install chromium")
def test_an_operation_can_be_looked_at_and_tried(browser: Any, tmp_path: Path) -> None:
    config = server_config(tmp_path)
    key = make_key(config.store_path, "blue")
    with live_server(config) as client, playground(browser) as page:
        asked: list[str] = []
        page.tab.on("request", lambda request: asked.append(request.url))
        page.tab.goto(str(client.base_url))
        page.tab.get_by_role("link", name="API").click()
        for tag in ("generation", "models", "adapters", "cache", "health"):
            page.tab.locator(f"#operations-tag-{tag}").wait_for()
        page.tab.locator(".authorize.unlocked").first.click()
        page.tab.locator(".auth-container input").fill(key)
        page.tab.locator(".auth-btn-wrapper .authorize").click()
        page.tab.locator(".auth-btn-wrapper .btn-done").click()
        chat = page.tab.locator("#operations-generation-create_chat_completion")
        chat.locator(".opblock-summary-control").click()
        chat.locator(".model-example, .body-param").first.wait_for()
        assert "adapter_capacity" in chat.locator(".responses-table").inner_text()
        models = page.tab.locator("#operations-models-list_models")
        models.locator(".opblock-summary-control").click()
        models.locator(".try-out__btn").click()
        models.locator(".execute").click()
        answered = models.locator(".live-responses-table .response").filter(has_text="scripted-model")
        answered.wait_for()
        assert answered.locator(".response-col_status").inner_text().startswith("200")
        assert {httpx.URL(url).host for url in asked if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
        assert f"{client.base_url}/v1/models" in asked
