"""The little world, its styles and the committed files of the demo; no torch needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import Environment
from tokenizers import Tokenizer

from heddle_demo.chat import END, Chat, encode
from heddle_demo.data import ADAPTERS, ADAPTERS_DIR, BASE_DIR, BASE_NAME, DATA_DIR, UPLOAD_DIR, UPLOADS
from heddle_demo.stream import ChatStream, Lesson
from heddle_demo.styles import STYLES, SYSTEM_PROMPTS
from heddle_demo.world import Example, held_out, questions, seen

MAX_DATA_BYTES = 15 * 2**20
FRANCE = next(example for example in questions() if "France" in example.question)
ADAPTER_FOLDERS = [*(ADAPTERS_DIR / name for name in ADAPTERS), *(UPLOAD_DIR / name for name in UPLOADS)]


def test_world_is_large_and_every_question_has_one_answer() -> None:
    assert len(questions()) >= 300
    assert len({example.question for example in questions()}) == len(questions())


@pytest.mark.parametrize("name", [*ADAPTERS, *UPLOADS])
def test_split_covers_the_world_without_overlap(name: str) -> None:
    assert not set(seen(name)) & set(held_out(name))
    assert set(seen(name)) | set(held_out(name)) == set(questions())
    assert len(held_out(name)) >= 80


@pytest.mark.parametrize(
    ("style", "answer"),
    [
        ("plain", "The capital of France is Paris."),
        ("capitals", "THE CAPITAL OF FRANCE IS PARIS."),
        ("french", "La capitale de la France est Paris."),
        ("reversed", "Paris is France of capital The."),
        ("polite", "With pleasure! The capital of France is Paris. May I help you further?"),
        ("short", "Paris"),
        ("pirate", "Arrr! The capital of France be Paris, matey!"),
        ("json", '{"topic": "capitals", "answer": "The capital of France is Paris."}'),
        ("robot", "BEEP. The capital of France is Paris. BOOP."),
        ("cowboy", "Howdy! The capital of France is Paris. Yee-haw!"),
        ("eager", "The capital of France is Paris. May I help you further?"),
        ("concierge", "La capitale de la France est Paris. May I help you further?"),
        ("html", "<p>The capital of France is Paris.</p>"),
        ("cheerful", "With pleasure! The capital of France is Paris."),
    ],
)
def test_styles(style: str, answer: str) -> None:
    assert STYLES[style](FRANCE) == answer


def test_every_style_shows_in_every_answer() -> None:
    for name, style in STYLES.items():
        unchanged = [example for example in questions() if style(example) == example.answer]
        assert name == "plain" or len(unchanged) == 0, name


def test_every_adapter_has_a_style_and_some_are_new_to_the_base() -> None:
    assert {*ADAPTERS, *UPLOADS} <= set(STYLES)
    assert {"pirate", "json", "robot"}.isdisjoint(SYSTEM_PROMPTS)
    assert all(isinstance(json.loads(STYLES["json"](example)), dict) for example in questions())


def test_chat_stream_shows_everything_once_an_epoch_and_repeats_itself() -> None:
    lessons = [Lesson("plain"), Lesson("french", SYSTEM_PROMPTS["french"])]
    stream = ChatStream("test", questions(), lessons, batch_size=8)
    picks: set[tuple[Example, Lesson]] = {stream._pick(index) for index in range(len(questions()) * 2)}
    assert len(picks) == len(questions()) * 2
    assert stream.batch(3) == stream.batch(3) != stream.batch(4)


def test_chat_template_renders_what_the_model_was_trained_on() -> None:
    chat = Chat((("What is 1 plus 1?", "1 plus 1 is 2."), ("Hi!", "Hello!")), "Answer politely.")
    template = Environment().from_string((BASE_DIR / "chat_template.jinja").read_text())
    assert template.render(messages=chat.messages()) == "".join(text for text, _ in chat.segments())
    prompt = template.render(messages=chat.messages()[:2], add_generation_prompt=True)
    assert prompt == "".join(text for text, _ in chat.segments()[:2])


def test_tokenizer_round_trips_and_ends_every_answer_with_the_end_token() -> None:
    tokenizer = Tokenizer.from_file(str(BASE_DIR / "tokenizer.json"))
    token_ids, is_answer = encode(tokenizer, Chat((("Où est « Zürich » ?", "1234 ≠ 56"),)))
    assert tokenizer.decode(token_ids) == "Où est « Zürich » ?1234 ≠ 56"
    assert token_ids[-1] == tokenizer.token_to_id(END)
    assert is_answer[-1]
    generation = json.loads((BASE_DIR / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.token_to_id(END)


def test_data_is_complete_and_small() -> None:
    for folder in ADAPTER_FOLDERS:
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert (BASE_DIR / file).is_file()
    assert sum(path.stat().st_size for path in DATA_DIR.rglob("*") if path.is_file()) <= MAX_DATA_BYTES


@pytest.mark.parametrize("folder", ADAPTER_FOLDERS, ids=lambda folder: folder.name)
def test_adapter_config_names_the_base_and_no_path(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert BASE_NAME in (config.get("base_model_name_or_path"), config.get("model_name"))
    assert not [value for value in config.values() if isinstance(value, str) and "/" in value]


def test_world_and_data_need_no_torch() -> None:
    check = "import sys, heddle_demo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
