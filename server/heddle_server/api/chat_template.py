"""Messages to the prompt text a chat model was trained on: the model's own Jinja template, in a sandbox.

Renders what transformers' `apply_chat_template` renders (a test compares them) without importing transformers.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from heddle_server.api.errors import InvalidRequest
from heddle_server.config import ConfigError

ChatMessage = Mapping[str, Any]
TEMPLATE_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


# Templates refuse what they cannot say (roles that do not alternate, ...) by raising: the request's fault.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError)


class ChatTemplate:
    """One model's template; `source` is None for a model that has none."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._knows_developer = source is not None and "developer" in source
        try:
            self._template = None if source is None else _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"The model's chat template is broken: {error}") from error

    @classmethod
    def from_folder(
        cls, model_path: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> ChatTemplate:
        """`chat_template.jinja` of the model's folder, or else what its tokenizer_config.json holds."""
        file = model_path / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else _default_template(config.get("chat_template"))
        return cls(source, special_tokens)

    def knows(self, variable: str) -> bool:
        """Whether the template looks at a variable at all."""
        return self.source is not None and variable in self.source

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The chat as text, up to where the assistant's answer starts."""
        if self._template is None:
            raise InvalidRequest(
                "This model has no chat template. Use /v1/completions with a prompt of your own.", param="messages"
            )
        try:
            return self._template.render(
                **{**self._special_tokens, **variables},
                messages=[self._plain(message) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except _REFUSALS as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error

    def render_open(self, messages: Sequence[ChatMessage], *arguments: Any, **options: Any) -> str:
        """The chat as text up to the end of the last message's words, so that an answer goes on from them."""
        end = secrets.token_hex(16)  # stands where the words end, and nowhere else
        last = {**messages[-1], "content": f"{messages[-1]['content']}{end}"}
        text = self.render([*messages[:-1], last], *arguments, add_generation_prompt=False, **options)
        words, mark, _ = text.partition(end)
        if not mark:
            message = "The model's chat template does not show the last message, so nothing can go on from it."
            raise InvalidRequest(message, param="continue_final_message")
        return words

    def _plain(self, message: ChatMessage) -> dict[str, Any]:
        role = message["role"]
        # OpenAI's newer word for "system"; few templates have heard of it.
        is_renamed = role == "developer" and not self._knows_developer
        return {**message, "role": "system" if is_renamed else role}


def _default_template(entry: object) -> str | None:
    """tokenizer_config.json holds one template or a list of named ones."""
    if isinstance(entry, list):
        entry = next((each.get("template") for each in entry if each.get("name") == "default"), None)
    return entry if isinstance(entry, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; in serving it renders its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which no model has seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)  # noqa: DTZ005  (templates tell the model the local date)
