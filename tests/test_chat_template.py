"""The chat template renders what transformers renders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import save_tokenizer
from heddle_server.api.chat_template import ChatTemplate
from heddle_server.api.errors import InvalidRequest
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.config import ConfigError

MESSAGES = [
    {"role": "system", "content": "Be brief. <b>é</b> {{ 1 }}"},
    {"role": "user", "content": "Hello\n"},
    {"role": "assistant", "content": " Hi 🧵"},
    {"role": "user", "content": "Bye"},
]

TEMPLATES = {
    "own": None,
    "blocks": """
    {% for message in messages %}
        {% if loop.first %}
{{ bos_token }}{% endif %}
        {% if message['role'] == 'assistant' %}
            {% generation %}{{ message['content'] | trim }}{% endgeneration %}
        {% else %}
[{{ message['role'] | upper }}] {{ message['content'] }}
        {% endif %}
    {% endfor %}
{{ eos_token }}{% if add_generation_prompt %}>{% endif %}
""",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ tools is none }}{{ documents is none }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}|{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}"
    "{% endfor %}{{ ns.n }}{{ pad_token }}",
    "date": "{{ strftime_now('%Y-%m') }}{{ messages[-1].content }}",
}


def template_of(folder: Path) -> ChatTemplate:
    tokenizer = Tokenizer(folder)
    return ChatTemplate.from_folder(folder, tokenizer.config, tokenizer.special_tokens)


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_what_transformers_renders(tmp_path: Path, name: str) -> None:
    source = TEMPLATES[name]
    folder = save_tokenizer(tmp_path) if source is None else save_tokenizer(tmp_path, source)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    text = template_of(folder).render(MESSAGES)
    assert text == reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = reference.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert Tokenizer(folder).encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize("is_list", [True, False])
def test_a_template_inside_the_config(tmp_path: Path, is_list: bool) -> None:
    folder = save_tokenizer(tmp_path, None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    source = "{{ messages[0].content }}!"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named if is_list else source}))
    assert template_of(folder).render(MESSAGES[1:]) == "Hello\n!"


def test_messages_that_the_template_refuses_are_the_requests_fault(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="Unknown role pirate"):
        template_of(save_tokenizer(tmp_path)).render([{"role": "pirate", "content": "x"}])
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        ChatTemplate("{{ messages[5].content.x }}", {}).render(MESSAGES)


def test_developer_is_system_for_templates_that_do_not_know_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert ChatTemplate("{{ messages[0].role }}", {}).render(messages) == "system"
    assert ChatTemplate("{{ messages[0].role }}{# developer #}", {}).render(messages) == "developer"


def test_a_model_without_a_template_points_to_completions(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        template_of(save_tokenizer(tmp_path, None)).render(MESSAGES)


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="broken"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize(
    "source", ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__subclasses__() }}", "{{ messages.append(1) }}"]
)
def test_templates_run_in_a_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render(MESSAGES)


@pytest.mark.parametrize("words", ["en", "|", "<", "im_end", "user", " Two words", ""])
def test_an_answer_goes_on_exactly_where_the_last_words_end(words: str) -> None:
    template = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", {}
    )
    messages = [{"role": "user", "content": "en"}, {"role": "assistant", "content": words}]
    expected = f"<|im_start|>user\nen<|im_end|>\n<|im_start|>assistant\n{words}"
    assert template.render_open(messages) == expected


def test_a_template_that_goes_too_deep_refuses_the_messages() -> None:
    deep: object = 5
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages[0].content | tojson }}", {}).render([{"role": "user", "content": deep}])
