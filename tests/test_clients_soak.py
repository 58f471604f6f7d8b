"""LangChain, LiteLLM and lm-eval against `heddle serve`, each in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from client_packages import CLIENTS, python_packages
from clients_server import ANSWER, PIRATE, clients_server, is_city
from documented import snippets
from heddle_demo.chat import Chat
from heddle_demo.data import BASE_DIR
from heddle_demo.parity.dequantised import dequantised_twin
from heddle_demo.world import questions
from test_demo_parity import Oracle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # raised by PEFT
]

RUN_SECONDS = 300
NUM_CHOICES = 4
LOGLIKELIHOOD_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with clients_server(tmp_path_factory.mktemp("server")) as server:
        yield server.address


@dataclass(frozen=True)
class Environment:
    """A virtual environment with one client in it."""

    bin: Path

    def run(self, *command: str, folder: Path | None = None) -> str:
        """What it prints; its programs come before all others'."""
        search = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        settings = {**os.environ, "PATH": search, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        process = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=RUN_SECONDS)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    def ask(self, script: str, *arguments: str) -> Any:
        """What one of the scripts in `clients/` answers."""
        return json.loads(self.run("python", str(CLIENTS / script), *arguments).splitlines()[-1])


def environment(request: pytest.FixtureRequest, name: str) -> Environment:
    assert request.config.cache is not None
    return Environment(python_packages(request.config.cache.mkdir("clients"), name))


@pytest.fixture(scope="module")
def langchain(request: pytest.FixtureRequest) -> Environment:
    return environment(request, "langchain")


@pytest.fixture(scope="module")
def litellm(request: pytest.FixtureRequest) -> Environment:
    return environment(request, "litellm")


@pytest.fixture(scope="module")
def lm_eval(request: pytest.FixtureRequest) -> Environment:
    return environment(request, "lm_eval")


def test_langchain_answers(langchain: Environment, address: str) -> None:
    whole = langchain.ask("langchain_client.py", address, "invoked")
    assert (whole["by_model"], whole["by_field"]) == (PIRATE, PIRATE)
    assert (whole["usage"]["input_tokens"], whole["usage"]["output_tokens"]) == (12, 21)
    streamed = langchain.ask("langchain_client.py", address, "streamed")
    assert "".join(streamed["pieces"]) == PIRATE
    assert [usage["total_tokens"] for usage in streamed["usages"]] == [33]
    assert langchain.ask("langchain_client.py", address, "batch") == [ANSWER, "2 plus 3 is 5."]
    whole_text, streamed_text = langchain.ask("langchain_client.py", address, "completion")
    assert whole_text == streamed_text != ""


def test_langchain_structured_output_and_tools(langchain: Environment, address: str) -> None:
    assert [is_city(city) for city in langchain.ask("langchain_client.py", address, "structured")] == [True, True]
    called = langchain.ask("langchain_client.py", address, "tools")
    assert called["call"]["name"] == "City"
    assert is_city(called["call"]["args"])
    assert called["then"] == "stop"
    (streamed,) = langchain.ask("langchain_client.py", address, "streamed_tool")
    assert is_city(streamed["args"])


def test_langchain_errors(langchain: Environment, address: str) -> None:
    refused = langchain.ask("langchain_client.py", address, "refused")
    assert refused == {"code": "model_not_found", "param": "model"}


@pytest.mark.parametrize("prefix", ["openai", "hosted_vllm"])
def test_litellm(prefix: str, litellm: Environment, address: str) -> None:
    def ask(case: str) -> Any:
        return litellm.ask("litellm_client.py", address, prefix, case)

    assert ask("whole") == {"by_model": PIRATE, "by_field": PIRATE, "usage": [12, 21]}
    assert ask("streamed") == {"text": PIRATE, "tokens": [33]}
    assert ask("asynchronous") == PIRATE
    assert is_city(ask("structured"))
    assert ask("text") != ""
    assert ask("refused") == {
        "model": ["NotFoundError", 404],
        "adapter": ["BadRequestError", 404],  # its class comes from the error's type, OpenAI's for a wrong request
        "field": ["BadRequestError", 400],
        "context": ["ContextWindowExceededError", 400],
    }


def test_litellm_tools(litellm: Environment, address: str) -> None:
    choice = litellm.ask("litellm_client.py", address, "openai", "tool")
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "look_up"
    assert is_city(json.loads(call["function"]["arguments"]))


@pytest.mark.parametrize("client", ["LangChain", "LiteLLM"])
def test_the_documented_snippets(client: str, address: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    script = tmp_path / "documented.py"
    for snippet in snippets(client):
        script.write_text(snippet.at(address))
        assert request.getfixturevalue(client.lower()).run("python", str(script)) == snippet.output


@dataclass(frozen=True)
class Item:
    """A question with the answers to choose from; `answer` is the right one's place."""

    prompt: str
    choices: list[str]
    answer: int


def make_item(number: int) -> Item:
    """The question of this number, its answer among those to others of its topic."""
    asked = questions()[number]
    wrong = [each.answer for each in questions() if each.topic == asked.topic and each.answer != asked.answer]
    answer = number % NUM_CHOICES
    choices = wrong[: NUM_CHOICES - 1]
    choices.insert(answer, asked.answer)
    return Item(Chat(((asked.question, ""),)).segments()[0][0], choices, answer)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [make_item(number) for number in range(0, len(questions()), 7)]


@pytest.fixture(scope="module")
def transformers() -> Oracle:
    return Oracle(dequantised_twin(BASE_DIR, double_quantization=True), torch.float32)


def loglikelihoods(oracle: Oracle, adapter: str, item: Item) -> list[float]:
    """Of each choice after the prompt."""
    tokenizer = Tokenizer.from_file(str(BASE_DIR / "tokenizer.json"))
    sums = []
    for choice in item.choices:
        first = len(tokenizer.encode(item.prompt).ids)
        token_ids = tokenizer.encode(item.prompt + choice).ids
        logprobs = oracle.logprobs(adapter, token_ids, first - 1)
        sums.append(logprobs.gather(1, torch.tensor(token_ids[first:])[:, None]).sum().item())
    return sums


def share_of_right(items: list[Item], scores: list[list[float]]) -> float:
    return sum(row.index(max(row)) == item.answer for item, row in zip(items, scores, strict=True)) / len(items)


@pytest.mark.parametrize(
    ("adapter", "further_arguments", "further_options"),
    [("reversed", "", ""), ("base", ",num_concurrent=8", " --batch_size 4"), ("base", ",tokenized_requests=False", "")],
)
def test_lm_eval_scores_as_transformers_does(
    adapter: str,
    further_arguments: str,
    further_options: str,
    lm_eval: Environment,
    address: str,
    items: list[Item],
    transformers: Oracle,
    tmp_path: Path,
) -> None:
    task, command = snippets("lm-eval")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "world.yaml").write_text(task.code)
    (tmp_path / "tasks" / "world.jsonl").write_text("".join(f"{json.dumps(vars(item))}\n" for item in items))
    shutil.copytree(BASE_DIR, tmp_path / "base")
    tokenizer = "tokenizer=./base"
    words = command.at(address).replace("model=reversed", f"model={adapter}")
    words = words.replace(tokenizer, tokenizer + further_arguments).rstrip() + further_options
    lm_eval.run("bash", "-c", words, folder=tmp_path)

    (samples,) = (tmp_path / "results").glob("*/samples_world_*.jsonl")
    told = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: int(sample["doc_id"]))
    expected = [loglikelihoods(transformers, adapter, item) for item in items]
    for sample, row in zip(told, expected, strict=True):
        assert [float(value) for value, _ in sample["filtered_resps"]] == pytest.approx(
            row, abs=LOGLIKELIHOOD_TOLERANCE
        )
    (file,) = (tmp_path / "results").glob("*/results_*.json")
    scores = json.loads(file.read_text())["results"]["world"]
    by_length = [
        [value / len(choice) for value, choice in zip(row, item.choices, strict=True)]
        for item, row in zip(items, expected, strict=True)
    ]
    assert scores["acc,none"] == pytest.approx(share_of_right(items, expected))
    assert scores["acc_norm,none"] == pytest.approx(share_of_right(items, by_length))
    assert scores["acc,none"] > 1 / NUM_CHOICES
