"""An answer's text as it comes, taken apart: words, reasoning, tool calls.

The taking apart is transformers' own (`ResponseParser`, driven by the base's `response_template`); here its events
become what is streamed, and an answer that keeps no form comes out as the words it is.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heddle_server.api.answer_format import REASONING_FIELDS

if TYPE_CHECKING:
    from transformers.utils.chat_parsing import ResponseParser


@dataclass(frozen=True)
class CalledTool:
    """A call that the model has written."""

    id: str
    name: str
    arguments: str  # JSON text


@dataclass(frozen=True)
class Parts:
    """What more of an answer's text came to."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[CalledTool, ...] = ()

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.content + other.content, self.reasoning + other.reasoning, self.tool_calls + other.tool_calls)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


def load_parser() -> type[ResponseParser]:
    """transformers' parser, which takes seconds to import and which only some bases need."""
    from transformers.utils.chat_parsing import ResponseParser

    parser: type[ResponseParser] = ResponseParser
    return parser


class AnswerReader:
    """One answer's. `feed` returns what became certain, `finish` the rest.

    The parser gets one character after the other, so that at every event it is known what has not been told: where an
    answer keeps no form after all, that comes out as the words it is, marks and white space included.
    """

    def __init__(
        self, template: Mapping[str, Any], prefix: str, tools: Sequence[Mapping[str, Any]], *, is_parallel: bool = True
    ) -> None:
        """`prefix`: what the chat template has written of the answer already; without `is_parallel` the answer is over
        with its first tool call."""
        self._parser: ResponseParser | None = load_parser()(dict(template), prefix=prefix, tools=list(tools))
        self._is_parallel = is_parallel
        self._has_called = False
        self._untold = ""  # what came since something was told
        self._num_held = 0  # leading characters of it that are white space after words: layout, or more words follow
        events = self._parser.initial_events
        self._is_after_mark = _has(events, REASONING_FIELDS)  # where white space is layout
        self.reasoning_is_open = _is_open(events, REASONING_FIELDS)
        self.reasoning_is_over = not self.reasoning_is_open and _has(events, REASONING_FIELDS)

    @property
    def is_over(self) -> bool:
        """Whether what follows is of no interest any more."""
        return self._has_called and not self._is_parallel

    def feed(self, text: str) -> Parts:
        """What is certain now."""
        told = _Told()
        for number, character in enumerate(text):
            if self.is_over:
                break
            if self._parser is None:
                told.content.append(text[number:])
                break
            self._untold += character
            try:
                events = self._parser.feed(character)
            except Exception:  # whatever a template's parsers raise at text of another form
                self._give_up(told)
            else:
                self._read(events, told)
        return told.parts()

    def finish(self) -> Parts:
        """The rest, once no more text comes."""
        told = _Told()
        if self._parser is None or self.is_over:
            return told.parts()
        try:
            _, events = self._parser.finalize()
        except Exception:
            self._give_up(told)
        else:
            self._read(events, told)
            if not self._is_after_mark and not self._has_called:
                told.content.append(self._untold)
        return told.parts()

    def _read(self, events: Sequence[Mapping[str, Any]], told: _Told) -> None:
        for event in events:
            kind, field = event["type"], event["field"]
            if kind == "region_chunk" and field == "content":
                told.content.append(self._words(event["text"]))
            elif kind == "region_chunk" and field in REASONING_FIELDS:
                told.reasoning.append(self._words(event["text"]))
            elif kind == "region_open" and field in REASONING_FIELDS:
                # Reasoning is told as it comes, so its mark is layout now, and white space around it.
                self._untold, self._num_held, self._is_after_mark = "", 0, True
            elif kind == "region_close" and field == "tool_calls":
                self._call(event["value"], told)
            elif kind == "region_close" and field in REASONING_FIELDS:
                self._untold, self._num_held, self._is_after_mark = "", 0, True

    def _words(self, text: str) -> str:
        """Of `text`, which comes first among what is untold, what is certain to be no layout."""
        end = self._num_held + len(text)
        words, rest = self._untold[:end], self._untold[end:]
        if self._is_after_mark:
            words = words.lstrip()
        told = words.rstrip()
        self._is_after_mark = self._is_after_mark and not told
        self._untold, self._num_held = words[len(told) :] + rest, len(words) - len(told)
        return told

    def _call(self, value: object, told: _Told) -> None:
        """A region is whole that should be calls; what is none comes out as words."""
        calls = _calls(value)
        if calls is None:
            told.content.append(self._untold)
            self._untold, self._num_held = "", 0
            return
        self._has_called = True
        told.tool_calls += calls if self._is_parallel else calls[:1]
        self._untold = self._untold[: self._num_held]  # in case that more words follow those before the call
        self._is_after_mark = not self._num_held

    def _give_up(self, told: _Told) -> None:
        self._parser = None
        told.content.append(self._untold)
        self._untold = ""


class _Told:
    """What one piece of text came to, as it is found out."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: list[CalledTool] = []

    def parts(self) -> Parts:
        return Parts("".join(self.content), "".join(self.reasoning), tuple(self.tool_calls))


def _calls(value: Any) -> tuple[CalledTool, ...] | None:
    """What a template has made of one or several calls; None for what is JSON and no call."""
    try:
        functions = [each["function"] for each in (value if isinstance(value, list) else [value])]
        return tuple(_called(function["name"], function.get("arguments")) for function in functions)
    except (TypeError, KeyError, AttributeError, ValueError):
        return None


def _called(name: object, arguments: object) -> CalledTool:
    """Raises `TypeError` for a name that is no text, `ValueError` for what cannot be sent: NaN, half a character."""
    if not isinstance(name, str):
        raise TypeError("a tool's name is no text")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)
    (name + text).encode()
    return CalledTool(f"call_{uuid.uuid4().hex}", name, text)


def _has(events: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> bool:
    return any(event["field"] in fields for event in events)


def _is_open(events: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> bool:
    kinds = [event["type"] for event in events if event["field"] in fields]
    return bool(kinds) and kinds[-1] != "region_close"
