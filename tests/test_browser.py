"""The playground as people use it: Chromium in front of `heddle serve` with the demo's base and adapters."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

import scripted_engine
from demo_server import demo_server
from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_demo.data import ADAPTERS_DIR, BASE_NAME, UPLOAD_DIR
from live_server import live_server, server_config, wait_until
from playground import CHROMIUM, PHONE, SCREENSHOTS, Playground, chromium, playground
from tenant_keys import make_key

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

QUESTION = "What is the capital of France?"
AWKWARD = """It's "$HOME" `id` \\n {"a": 1} <b>&amp;</b> — 😀\nsecond line's end\\"""
COUNTRIES = ("Spain", "Italy", "Norway", "Greece", "Poland", "Austria", "Ireland", "Portugal", "Hungary", "France")
NUM_COPIES = 60  # of one adapter, more than the picker loads at once


def adapter_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


ROBOT = adapter_files(UPLOAD_DIR / "robot")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with demo_server(
        tmp_path_factory.mktemp("server"), adapters=ADAPTERS_DIR, model_name=BASE_NAME, pool_bytes="128MiB"
    ) as server:
        yield server.address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Playground]:
    with playground(browser) as page:
        page.open(address)
        yield page


def upload(client: httpx.Client, name: str, files: dict[str, bytes]) -> None:
    response = client.post("/v1/adapters", data={"name": name}, files={n: (n, d) for n, d in files.items()})
    assert response.status_code in (200, 201), response.text


def delete(client: httpx.Client, name: str) -> None:
    client.delete(f"/v1/adapters/{name}").raise_for_status()


def test_base_and_adapters_answer_side_by_side(page: Playground) -> None:
    assert [page.pane(number).get_attribute("aria-label") for number in range(3)] == ["base", "capitals", "cheerful"]
    page.pick(2, "pirate")
    assert page.ask(QUESTION) == [
        "The capital of France is Paris.",
        "THE CAPITAL OF FRANCE IS PARIS.",
        "Arrr! The capital of France be Paris, matey!",
    ]
    assert [body["model"] for body in page.requests] == ["base", "capitals", "pirate"]
    assert len({json.dumps({**body, "model": None}) for body in page.requests}) == 1, "all else is the same for all"
    assert page.requests[0]["seed"] == 1
    first_token, speed, load, answer, prompt, end = page.pane(0).locator("dd").all_inner_texts()
    assert first_token.endswith(" ms")
    assert speed.endswith(" tok/s")
    assert (load, answer, end) == ("–", "12 tokens", "finished")
    assert int(prompt.split(",")[0]) > 5
    assert page.pane(0).locator(".reply .state").inner_text() == "the base alone"


def test_a_cold_start_is_explained_and_the_badge_follows(page: Playground) -> None:
    page.pick(1, "reversed")
    assert page.pane(1).locator(".chosen .tier").inner_text() == "disk"
    assert "It is on disk: the first reply waits for the load." in page.pane(1).locator(".empty").inner_text()
    facts = page.pane(1).locator(".empty .report").inner_text().split("\n")
    assert facts[:2] == ["Method", "LoRA, rank 32"]
    assert facts[-2:] == ["Page pool", "1,376,256 bytes: 14 pages"]
    page.ask(QUESTION)
    state = page.pane(1).locator(".reply .state")
    load = page.pane(1).locator("dd").nth(2).inner_text()
    assert state.inner_text() == f"its adapter came from disk: {load}, once"
    page.pane(1).locator(".chosen .tier:text-is('device')").wait_for()
    page.ask(QUESTION)
    assert state.last.inner_text() == "its adapter was on the device"


def test_a_chat_goes_on_until_a_new_one_begins(page: Playground) -> None:
    page.ask(QUESTION)
    page.ask("What is the capital of Spain?")
    turns = [(turn["role"], turn["content"]) for turn in page.requests[-3]["messages"]]
    assert turns[:2] == [("user", QUESTION), ("assistant", "The capital of France is Paris.")]
    assert turns[2:] == [("user", "What is the capital of Spain?")]
    page.tab.locator("#new-chat").click()
    assert page.tab.locator(".turn").count() == 0
    page.ask(QUESTION)
    assert len(page.requests[-1]["messages"]) == 1


def test_an_answer_can_be_stopped_and_stays_in_the_conversation(browser: Any, tmp_path: Path) -> None:
    with live_server(server_config(tmp_path)) as server, playground(browser) as page:
        page.tab.goto(str(server.base_url))
        page.pane(0).wait_for()
        page.parameter("seed", str(scripted_engine.NEVER_ENDS))
        page.parameter("max_completion_tokens", "8")
        page.tab.locator("#question").press("Enter")
        page.pane(0).locator(".answer").filter(has_text=re.compile(".")).wait_for()
        page.tab.keyboard.press("Escape")
        (begun,) = page.answers()
        assert page.pane(0).locator(".reply .state").inner_text() == "stopped"
        assert page.pane(0).locator(".reply .error").is_hidden()
        wait_until(lambda: server.get("/v1/cache").json()["requests"]["running"] == 0)
        page.parameter("seed", "1")
        page.ask("And?")
        assert page.requests[-1]["messages"][1] == {"role": "assistant", "content": begun}


def test_panes_come_and_go_up_to_six(page: Playground) -> None:
    add = page.tab.locator("#add-pane")
    while add.is_enabled():
        add.click()
    assert page.num_panes == 6
    assert len(set(page.ask(QUESTION))) == 3
    while page.num_panes:
        page.pane(0).locator(".remove").click()
    assert page.tab.locator("#ask").is_disabled()
    add.click()
    assert page.ask(QUESTION) == ["The capital of France is Paris."]


def test_the_picker_searches_and_pages_on_the_server(page: Playground, client: httpx.Client) -> None:
    files = adapter_files(ADAPTERS_DIR / "short")
    for number in range(NUM_COPIES):
        upload(client, f"many-{number:02}", files)
    page.pane(1).locator("button.chosen").click()
    options = page.pane(1).locator(".options li")
    page.pane(1).locator(".hint:text('more follow')").wait_for()
    assert options.count() == 51, "the base, and one page"
    options.last.scroll_into_view_if_needed()
    page.pane(1).locator(".options .name:text-is('short')").wait_for()
    page.pane(1).locator(".search").fill("many-5")
    page.pane(1).locator(".hint:text-is('10 shown')").wait_for()
    page.pane(1).locator(".search").fill("pirate@7")
    page.pane(1).locator(".hint:text('pirate')").wait_for()
    page.tab.keyboard.press("Escape")
    assert page.focused() == "chosen"
    page.pick(1, "pirate")
    page.pick(1, "many-42")
    assert page.ask(QUESTION)[1] == "Paris"
    for number in range(NUM_COPIES):
        delete(client, f"many-{number:02}")


def test_an_adapter_is_dropped_tried_uploaded_and_asked(page: Playground, client: httpx.Client) -> None:
    page.drop(ROBOT)
    findings = page.tab.locator(".findings")
    findings.get_by_text("LoRA, rank 12").wait_for()
    assert "not given yet." in findings.inner_text()
    page.tab.locator("#upload-name").fill("robot")
    page.tab.locator("#upload-name").press("Tab")
    findings.get_by_text("robot is free.").wait_for()
    assert "model.layers.*.mlp.{gate_proj,up_proj,down_proj}, 6 each" in findings.inner_text()
    assert re.search(r"1,290,240 bytes: 14 pages, [0-9.]+ % of it", findings.inner_text())
    page.picture("upload", "#upload-dialog")
    page.tab.locator("#upload-dialog [type=submit]:enabled").click()
    page.pane(3).wait_for()
    assert page.tab.locator("#notice").inner_text() == "robot@1 is uploaded: ask it now."
    assert page.ask(QUESTION)[3] == "BEEP. The capital of France is Paris. BOOP."
    # The same again is recognised; other content becomes a new version.
    page.drop(ROBOT)
    page.tab.locator("#upload-name").fill("robot")
    page.tab.locator("#upload-name").press("Tab")
    findings.get_by_text("nothing would change").wait_for()
    page.tab.locator("#upload-name").fill("pirate")
    page.tab.locator("#upload-name").press("Tab")
    findings.get_by_text("a new version of pirate").wait_for()
    page.tab.keyboard.press("Escape")
    assert not page.tab.locator("#upload-dialog").is_visible()
    delete(client, "robot")


def test_a_chosen_folder_suggests_its_name(page: Playground) -> None:
    page.tab.locator("#upload-folder").set_input_files(UPLOAD_DIR / "robot")
    page.tab.locator(".findings").get_by_text("robot is free.").wait_for()
    assert page.tab.locator("#upload-name").input_value() == "robot"
    page.tab.locator(".close").click()
    assert page.num_panes == 3


def test_a_bad_upload_is_told_in_the_servers_words(page: Playground) -> None:
    weights = ROBOT[WEIGHTS_FILE].replace(b"q_proj.lora_A", b"q_part.lora_A")  # as long, so the file stays sound
    page.drop({**ROBOT, WEIGHTS_FILE: weights})
    refusal = page.tab.locator(".refusal")
    refusal.wait_for()
    assert refusal.locator("h3").inner_text() == f"Refused because of {WEIGHTS_FILE}"
    assert "self_attn.q_part" in refusal.inner_text()
    assert page.tab.locator("#upload-dialog [type=submit]").is_disabled()
    page.picture("refusal", "#upload-dialog")
    page.drop({**ROBOT, WEIGHTS_FILE: ROBOT[WEIGHTS_FILE][:1000]})
    page.tab.locator(".refusal .message").filter(has_text="header").wait_for()


def test_files_that_are_no_adapter_are_told_apart_before_anything_is_sent(page: Playground) -> None:
    page.drop({"adapter_model.bin": b"\x80\x02", CONFIG_FILE: ROBOT[CONFIG_FILE]})
    message = page.tab.locator(".refusal .message").inner_text()
    assert f"{WEIGHTS_FILE} is missing" in message
    assert "safe_serialization=True" in message


def test_the_map_is_live(page: Playground, client: httpx.Client) -> None:
    upload(client, "mapped", ROBOT)
    page.pick(2, "mapped")
    page.ask(QUESTION)
    mapped = page.tab.locator("#map [role=option][aria-label^='mapped@1']")
    mapped.wait_for()
    body = {"messages": [{"role": "user", "content": QUESTION}], "ignore_eos": True, "max_tokens": 1900, "stream": True}
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
        page.shows("#legend-kv", r"\d\d+")
        page.shows("#requests .value >> nth=0", "3")
        assert page.tab.locator("#map .kv rect").count()
        mapped.hover()
        page.picture("map", "#engine")
    page.shows("#legend-kv", "0")
    assert page.tab.locator("#map .kv").count() == 0
    assert page.tab.locator("#latency .value").first.inner_text().endswith("ms")
    delete(client, "mapped")


def test_the_map_names_an_adapter_to_pointer_and_keyboard(page: Playground, client: httpx.Client) -> None:
    client.patch("/v1/adapters/pirate", json={"pinned": True}).raise_for_status()
    run = page.tab.locator("#map [role=option][aria-label^='pirate@1']")
    page.tab.locator("#map .is-pinned").wait_for()
    run.hover()
    assert "pirate@1" in page.tab.locator("#map-caption").inner_text()
    assert "pinned" in page.tab.locator("#map-caption").inner_text()
    page.tab.locator("#map [role=option][tabindex='0']").focus()
    page.tab.keyboard.press("Home")
    first = page.tab.locator("#map-caption").inner_text()
    page.tab.keyboard.press("End")
    assert page.tab.locator("#map-caption").inner_text() != first
    page.tab.locator("#pool-details summary").click()
    page.tab.locator("#adapter-table th:text-is('pirate@1')").wait_for()
    client.patch("/v1/adapters/pirate", json={"pinned": False}).raise_for_status()


def test_a_wrong_schema_is_told_at_its_field(page: Playground) -> None:
    problem = page.tab.locator("#problem-response_format")
    page.parameter("response_format", "{")
    assert problem.inner_text().startswith("This is not JSON yet")
    page.parameter("response_format", "[]")
    assert "is an object" in problem.inner_text()
    page.parameter("response_format", '{"type": "nonsense"}')
    assert problem.inner_text() == ""
    page.ask(QUESTION)
    assert page.requests[-1]["response_format"]["json_schema"]["strict"] is True
    problem.filter(has_text=" ").wait_for()
    assert page.tab.locator("#field-response_format").get_attribute("aria-invalid") == "true"
    assert problem.inner_text() == page.pane(0).locator(".reply .error").inner_text()
    page.parameter("response_format", "")
    assert page.ask(QUESTION)[0] == "The capital of France is Paris."


def test_a_servers_error_opens_the_drawer_at_its_field(page: Playground) -> None:
    page.parameter("max_completion_tokens", "100000")
    page.tab.evaluate("document.getElementById('parameters').open = false")
    page.ask(QUESTION)
    page.tab.locator("#problem-max_completion_tokens").filter(has_text="context").wait_for()


def test_what_is_copied_is_the_request_that_was_sent(page: Playground, tmp_path: Path) -> None:
    page.tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.parameter("stop", "'\"\\")
    page.parameter("min_p", "0.01")
    page.parameter("system", AWKWARD)
    page.tab.locator("#question").fill(AWKWARD)
    page.tab.locator("#ask").click()
    page.answers()
    curl = page.copied(0, "curl")
    assert subprocess.run(["bash", "-n"], input=curl, text=True, check=False).returncode == 0
    # `curl` is a function here that shows the body it was given, so that the shell itself is what unquotes.
    shown = subprocess.run(
        ["bash", "-s"],
        input=f'curl() {{ printf %s "${{@: -1}}"; }}\n{curl}',
        text=True,
        check=True,
        capture_output=True,
    )
    assert json.loads(shown.stdout) == page.requests[0]
    python = ast.parse(page.copied(0, "Python"))
    call = next(node for node in ast.walk(python) if isinstance(node, ast.Call) and node.keywords[0].arg == "model")
    told = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    assert {**told.pop("extra_body"), **told} == page.requests[0]
    if shutil.which("node"):
        script = tmp_path / "copied.mjs"
        script.write_text(page.copied(0, "JavaScript"))
        subprocess.run(["node", "--check", script], check=True)


def test_what_is_copied_runs(page: Playground) -> None:
    page.tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.ask(QUESTION)
    python = page.copied(1, "Python")
    assert subprocess.run([sys.executable, "-c", python], text=True, check=True, capture_output=True).stdout == (
        "THE CAPITAL OF FRANCE IS PARIS.\n"
    )
    if shutil.which("curl"):
        curl = subprocess.run(["bash", "-c", page.copied(0, "curl")], text=True, check=True, capture_output=True)
        assert curl.stdout.endswith("data: [DONE]\n\n")


def test_tokens_are_coloured_and_tell_what_else_was_likely(page: Playground) -> None:
    page.pane(0).locator(".heat").click()
    page.ask(QUESTION)
    assert page.requests[0]["top_logprobs"] == 5
    assert "logprobs" not in page.requests[1]
    tokens = page.pane(0).locator(".token[role=option]")
    assert "".join(tokens.all_inner_texts()).startswith("The capital of France is Paris.")
    inspector = page.pane(0).locator(".inspector")
    tokens.nth(1).hover()
    assert inspector.locator(".alternative").count() >= 5
    tokens.first.focus()
    page.tab.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("(token) => token === document.activeElement")
    assert "%" in inspector.locator(".taken").inner_text()
    page.pane(0).locator(".heat").click()
    assert page.pane(0).locator(".answer").inner_text() == "The capital of France is Paris."
    if SCREENSHOTS:  # of a reply with unlikely tokens in it
        page.pane(0).locator(".heat").click()
        page.parameter("temperature", "1.8")
        page.ask("What can you tell me about France?")
        unsure = page.pane(0).locator(".token[role=option][data-heat='4']").first
        unsure.focus()
        page.picture("probabilities", ".pane >> nth=0")


def test_text_is_never_markup(page: Playground, client: httpx.Client) -> None:
    client.patch("/v1/adapters/french", json={"description": "<img src=x onerror=alert(1)>"}).raise_for_status()
    page.pick(1, "french")
    page.ask("<img src=x> <script>alert(1)</script>")
    assert page.pane(1).locator(".question").inner_text() == "<img src=x> <script>alert(1)</script>"
    assert page.tab.locator("#panes img, #panes script").count() == 0
    page.tab.locator("#new-chat").click()
    assert page.pane(1).locator(".empty").inner_text().startswith("<img")
    client.patch("/v1/adapters/french", json={"description": ""}).raise_for_status()


def test_the_theme_follows_the_system_until_one_is_chosen(browser: Any, address: str) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with playground(browser, color_scheme="dark") as page:
        page.open(address)
        dark = page.tab.evaluate(ground)
        page.pick(2, "pirate")
        page.ask(QUESTION)
        page.tab.locator("#map [role=option]").first.wait_for()
        page.picture("dark")
        page.tab.locator("#theme").select_option("light")
        light = page.tab.evaluate(ground)
        assert light != dark
        page.tab.reload()
        assert page.tab.evaluate(ground) == light
        page.tab.locator("#theme").select_option("system")
        assert page.tab.evaluate(ground) == dark


def test_everything_can_be_reached_and_left_by_keyboard(page: Playground) -> None:
    assert page.focused() == "question"
    page.tab.keyboard.press("Enter")
    assert page.answers()[0] == "The capital of France is Paris."
    page.tab.locator("#map [role=option]").first.wait_for()
    visited = []
    while (name := page.focused()) != "body":
        visited.append(name)
        assert len(visited) < 200, "the focus is trapped"
        page.tab.keyboard.press("Tab")
    for name in ("ask", "new-chat", "add-pane", "chosen", "transcript", "heat", "upload-folder", "run"):
        assert name in visited, visited
    assert visited.count("chosen") == 3


def test_a_server_with_keys_asks_for_one(browser: Any, tmp_path: Path) -> None:
    config = server_config(tmp_path)
    key, only_asks = make_key(config.store_path, "blue"), make_key(config.store_path, "blue", "infer")
    with live_server(config) as server, playground(browser) as page:
        page.tab.goto(str(server.base_url))
        field = page.tab.locator("#key")
        field.wait_for()
        assert "Authorization: Bearer" in page.tab.locator("#key-reason").inner_text()
        assert page.focused() == "key"
        field.fill("hdl_nobody_knows")
        field.press("Enter")
        page.tab.locator("#key-reason").filter(has_text="This key was not accepted").wait_for()
        field.fill(only_asks)
        field.press("Enter")
        page.pane(0).wait_for()
        page.tab.locator("#notice").filter(has_text="adapters:read").wait_for()
        page.parameter("max_completion_tokens", "4")
        assert page.ask("Hello") != [""]
        page.tab.locator("#change-key").click()
        field.fill(key)
        field.press("Enter")
        page.shows("#legend-free", r"\d+")
        assert not page.tab.locator("#throughput").is_visible(), "only an admin is told what all have the server do"
        assert page.tab.locator("#engine-problem").inner_text() == ""
        assert key not in page.tab.url
        page.tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
        for language in ("curl", "Python", "JavaScript"):
            copied = page.copied(0, language)
            assert "HEDDLE_API_KEY" in copied
            assert key not in copied
        page.tab.reload()
        page.pane(0).wait_for()
        assert not field.is_visible()


def test_it_fits_a_phone_and_a_wide_screen(browser: Any, address: str) -> None:
    with playground(browser, viewport=PHONE, has_touch=True) as page:
        page.open(address)
        page.ask(QUESTION)
        assert page.overflow() <= 0
        page.picture("phone")
        page.tab.evaluate("document.getElementById('parameters').open = true")
        page.drop(ROBOT)
        page.tab.locator(".report").wait_for()
        assert page.overflow() <= 0
    for width in (700, 1000, 1100):
        with playground(browser, viewport={"width": width, "height": 800}) as page:
            page.open(address)
            assert page.overflow() <= 0
    with playground(browser) as page:
        page.open(address)
        for country in COUNTRIES if SCREENSHOTS else ():  # something to see in the charts
            page.tab.locator("#new-chat").click()
            page.ask(f"What is the capital of {country}?")
        page.tab.locator("#new-chat").click()
        page.pick(1, "json")
        page.pick(2, "pirate")
        page.ask(QUESTION)
        page.tab.locator("#map [role=option]").first.wait_for()
        assert page.overflow() <= 0
        page.picture("light")


def test_nothing_moves_while_answers_come(page: Playground) -> None:
    page.ask(QUESTION)
    page.tab.locator("#map [role=option]").first.wait_for()
    page.tab.locator("#new-chat").click()
    page.tab.evaluate(
        """() => {
          window.shifts = [];
          new PerformanceObserver((list) => window.shifts.push(...list.getEntries().map((entry) => entry.value)))
            .observe({ type: "layout-shift", buffered: false });
        }"""
    )
    page.ask(QUESTION)
    page.ask("What is the capital of Italy?")
    assert sum(page.tab.evaluate("window.shifts")) < 0.01
