"""`heddle chat` against a real server: answers as they come, another adapter, a pipe, Ctrl-C for the answer alone."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from demo_server import DemoServer, demo_server
from heddle_demo.data import ADAPTERS_DIR
from heddle_server.chat.conversation import Conversation, Figures
from heddle_server.chat.terminal import converse
from heddle_server.cli import app
from heddle_server.server_address import ServerError
from heddle_server.server_client import ServerClient
from live_server import live_server, server_config, wait_until
from scripted_engine import NEVER_ENDS

QUESTION = "What is the capital of France?"
PLAIN, PIRATE = "The capital of France is Paris.", "Arrr! The capital of France be Paris, matey!"
HEDDLE = [sys.executable, "-m", "heddle_server"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    with demo_server(tmp_path_factory.mktemp("chat"), pool_bytes=16 << 20, adapters=ADAPTERS_DIR) as server:
        yield server


def talk(server: DemoServer, *lines: str) -> str:
    """What a terminal shows of these lines, typed one after another."""
    typed = iter(lines)

    def read_line(prompt: str) -> str:
        console.print(prompt, end="")
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    console = Console(file=io.StringIO(), width=160, markup=False, highlight=False)
    converse(Conversation(ServerClient(server.address), sampling={"temperature": 0}), console, read_line)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_answer_comes_in_pieces_and_ends_with_its_figures(server: DemoServer) -> None:
    conversation = Conversation(ServerClient(server.address), adapter="pirate", sampling={"temperature": 0})
    *pieces, figures = conversation.ask(QUESTION)
    assert len(pieces) > 5
    assert "".join(map(str, pieces)) == PIRATE
    assert isinstance(figures, Figures)
    assert figures.ttft_seconds > 0
    assert (figures.tokens_per_second or 0) > 0
    assert figures.tier in ("disk", "host", "device")
    assert figures.load_milliseconds is not None
    assert conversation.turns == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": PIRATE}]


def test_an_answer_that_is_left_early_stays_in_the_conversation(server: DemoServer) -> None:
    conversation = Conversation(ServerClient(server.address), sampling={"temperature": 0})
    answer = conversation.ask(QUESTION)
    first = next(answer)
    answer.close()
    assert conversation.turns[-1] == {"role": "assistant", "content": first}


def test_a_question_without_an_answer_is_forgotten(server: DemoServer) -> None:
    conversation = Conversation(ServerClient(server.address), adapter="nobody")
    with pytest.raises(ServerError, match="There is no adapter 'nobody'"):
        list(conversation.ask(QUESTION))
    assert conversation.turns == []


def test_the_system_message_comes_first_and_is_not_a_turn(server: DemoServer) -> None:
    told, untold = (Conversation(ServerClient(server.address), system=text) for text in ("Be brief. " * 20, None))
    counts = []
    for conversation in (told, untold):
        list(conversation.ask(QUESTION))
        assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
        body = conversation._body(conversation.turns[:1])
        reply = conversation.client.post("/v1/chat/completions", {**body, "stream_options": None})
        counts.append(reply["usage"]["prompt_tokens"])
    assert counts[0] > counts[1] + 20


def test_commands_at_the_terminal(server: DemoServer) -> None:
    shown = talk(
        server, QUESTION, "/new", "/adapter pirate", QUESTION, "/adapters pir", "/what", "/exit", "never asked"
    )
    assert shown.index(PLAIN) < shown.index(PIRATE)
    assert "base> " in shown
    assert "pirate> " in shown
    assert shown.count("first token after ") == 2
    assert "tok/s" in shown
    assert "the adapter was on the device" in shown or "the adapter came from " in shown
    listed = next(line for line in shown.splitlines() if "LoRA" in line)
    assert listed.split()[:3] == ["pirate", "LoRA", "8"]
    assert "never asked" not in shown


def test_an_error_is_shown_and_the_conversation_goes_on(server: DemoServer) -> None:
    shown = talk(server, "/adapter nobody", QUESTION, "/adapter", QUESTION)
    assert shown.index("There is no adapter 'nobody'") < shown.index(PLAIN)


def test_a_pipe_gets_the_plain_answer(server: DemoServer) -> None:
    options = ["chat", "--server", server.address, "--temperature", "0", "--max-tokens", "64"]
    answered = CliRunner().invoke(app, [*options, "--adapter", "pirate"], input=QUESTION)
    assert (answered.exit_code, answered.stdout, answered.stderr) == (0, f"{PIRATE}\n", "")
    refused = CliRunner().invoke(app, [*options, "--adapter", "nobody"], input=QUESTION)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("heddle: There is no adapter 'nobody'")
    absent = CliRunner().invoke(app, ["chat", "--server", "127.0.0.1:1"], input=QUESTION)
    assert (absent.exit_code, "no heddle server answers at" in absent.stderr) == (1, True)


def test_what_a_server_says_cannot_move_the_cursor() -> None:
    from heddle_server.chat.terminal import _shown

    assert _shown("a\tb\n\x1b[2Jc") == "a\tb\n\N{REPLACEMENT CHARACTER}[2Jc"


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    """At a real terminal, and the server is told too."""
    with live_server(server_config(tmp_path)) as client:
        terminal, other_end = pty.openpty()
        command = [*HEDDLE, "chat", "--server", str(client.base_url), "--seed", str(NEVER_ENDS)]
        with subprocess.Popen(command, stdin=other_end, stdout=other_end, stderr=other_end) as chat:
            os.close(other_end)
            shown = Screen(terminal)
            shown.wait_for("base> ")
            os.write(terminal, b"Hi\n")
            wait_until(lambda: client.get("/v1/cache").json()["requests"]["running"] == 1)
            time.sleep(0.3)
            chat.send_signal(signal.SIGINT)
            shown.wait_for("stopped")
            wait_until(lambda: client.get("/v1/cache").json()["requests"]["running"] == 0)
            shown.wait_for("base> ")
            os.write(terminal, b"/exit\n")
            assert chat.wait(20) == 0
        os.close(terminal)


class Screen:
    """What has come out of a terminal and was not waited for yet."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._text = ""

    def wait_for(self, words: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while words not in self._text:
            assert time.monotonic() < deadline, self._text
            if select.select([self._terminal], [], [], 0.1)[0]:
                self._text += os.read(self._terminal, 65_536).decode("utf-8", "replace")
        self._text = self._text.partition(words)[2]
