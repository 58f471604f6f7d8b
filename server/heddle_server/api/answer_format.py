"""How a base writes what is more than text: tool calls and reasoning, found out from its tokenizer's folder.

A tokenizer may bring its own `response_template` (transformers' declarative description of answers). For the families
that do not, `tool_formats/` has one each, chosen by what the chat template contains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from heddle_server.api.errors import InvalidRequest
from heddle_server.api.response_format import schema_grammar, within
from heddle_server.api.tools import FunctionTool

_FOLDER = Path(__file__).parent / "tool_formats"
_TOOL_CALLS = "tool_calls"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # what templates call it


@dataclass(frozen=True)
class CallSyntax:
    """How one tool call is written: a JSON object between two marks; perhaps several in a list between two more."""

    begin: str
    end: str
    arguments_key: str
    separator: str | None  # between calls; None: there is one at most
    list_begin: str | None = None  # None: calls follow one another
    list_end: str = ""


class AnswerFormat:
    """One base's."""

    def __init__(
        self, template: Mapping[str, Any], calls: CallSyntax | None, special_token_ids: Mapping[str, int]
    ) -> None:
        """`special_token_ids`: tokens that no text stands for; a grammar names them by id."""
        self._template = template
        self._calls = calls
        self._special_token_ids = special_token_ids

    def template(self, has_tools: bool) -> dict[str, Any]:
        """transformers' description of an answer; without tools nothing is taken for a call."""
        fields = {name: field for name, field in self._template["fields"].items() if has_tools or name != _TOOL_CALLS}
        return {**self._template, "fields": fields}

    @cached_property
    def has_special_marks(self) -> bool:
        """Whether calls or reasoning are marked by tokens that are no text, so that these have to be shown."""
        marks = json.dumps(self._template["fields"], ensure_ascii=False)
        return any(token in marks for token in self._special_token_ids)

    @property
    def reasoning_marks(self) -> tuple[str, str] | None:
        """What reasoning stands between, where it is two fixed strings."""
        for name in REASONING_FIELDS:
            field = self._template["fields"].get(name, {})
            begin, end = field.get("open"), field.get("close")
            if isinstance(begin, str) and isinstance(end, str):
                return begin, end
        return None

    def call_grammar(self, tools: Sequence[FunctionTool], *, is_parallel: bool) -> str:
        """The grammar of an answer that is calls of these tools and nothing else; raises `InvalidRequest`."""
        calls = self._calls
        if calls is None:
            message = "This model's tool calls are of a form that cannot be forced. Use 'auto'."
            raise InvalidRequest(message, param="tool_choice")
        call = _call_schema(tools, calls.arguments_key)
        if calls.list_begin is not None:
            number = {"minItems": 1} if is_parallel else {"minItems": 1, "maxItems": 1}
            listed = {"$defs": call.pop("$defs"), "type": "array", "items": call, **number}
            return within(schema_grammar(listed), self._rule("start", calls.list_begin, "@answer", calls.list_end))
        more = f" ({json.dumps(calls.separator)} call)*" if is_parallel and calls.separator is not None else ""
        return within(
            schema_grammar(call), f"start: call{more}\n" + self._rule("call", calls.begin, "@answer", calls.end)
        )

    def after_reasoning(self, grammar: str, *, is_open: bool) -> str:
        """The same grammar with reasoning allowed before it, or, where the prompt has opened it, its rest required."""
        marks = self.reasoning_marks
        if marks is None:
            return grammar
        begin, end = (self._literal(mark) for mark in marks)
        is_special = marks[1] in self._special_token_ids
        rest = f"rest: TEXT {end} SPACE?" if is_special else f"rest: reasoning SPACE?\nreasoning[lazy]: TEXT {end}"
        start = "start: rest @answer" if is_open else f"start: ({begin} rest)? @answer"
        return within(grammar, f"{start}\n{rest}\nTEXT: /(.|\\n)*/\nSPACE: /[ \\n]{{1,4}}/\n")

    def _rule(self, name: str, begin: str, body: str, end: str) -> str:
        return f"{name}: {self._literal(begin)} {body} {self._literal(end)}\n"

    def _literal(self, text: str) -> str:
        """A string of a Lark grammar, special tokens by their ids."""
        for token, token_id in self._special_token_ids.items():
            before, found, after = text.partition(token)
            if found:
                return f"{self._literal(before)} <[{token_id}]> {self._literal(after)}".strip()
        return json.dumps(text) if text else ""


def answer_format(
    config: Mapping[str, Any], chat_template: str | None, special_token_ids: Mapping[str, int]
) -> AnswerFormat | None:
    """What a tokenizer's folder says about answers; None for a base that writes nothing but text."""
    known = next((each for each in _known_formats() if _is_recognised(each, chat_template or "")), {})
    template = config.get("response_template") or known.get("response_template")
    if not template:
        return None
    calls = _call_syntax(known) if known else None
    if calls is not None and not _reads(template, calls):
        calls = None
    return AnswerFormat(_as_used(template, chat_template or ""), calls, special_token_ids)


@cache
def _known_formats() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.json")))


def _is_recognised(known: Mapping[str, Any], chat_template: str) -> bool:
    is_other = any(mark in chat_template for mark in known.get("not_by", ()))
    return not is_other and any(mark in chat_template for mark in known["recognised_by"])


def _reads(template: Mapping[str, Any], calls: CallSyntax) -> bool:
    """Whether a tokenizer's own template takes for calls what the family's syntax writes."""
    field = template["fields"].get(_TOOL_CALLS, {})
    begin = calls.begin if calls.list_begin is None else calls.list_begin
    return bool(field.get("content") == "json" and field.get("open", "") == begin.strip())


def _as_used(template: Mapping[str, Any], chat_template: str) -> dict[str, Any]:
    """Without the reasoning of a family's other members, which this one's template does not know."""
    fields = dict(template["fields"])
    for name in REASONING_FIELDS:
        mark = fields.get(name, {}).get("open")
        if isinstance(mark, str) and mark not in chat_template:
            del fields[name]
    return {**template, "fields": fields}


def _call_syntax(known: Mapping[str, Any]) -> CallSyntax:
    listed = known.get("list", {})
    return CallSyntax(
        **known["call"],
        separator=known.get("separator"),
        list_begin=listed.get("begin"),
        list_end=listed.get("end", ""),
    )


def _call_schema(tools: Sequence[FunctionTool], arguments_key: str) -> dict[str, Any]:
    """The schema of a call of any of these. References inside a tool's parameters are to these, wherever they lie."""
    parameters = {
        str(number): _moved(tool.function.parameters or {"type": "object", "properties": {}}, f"#/$defs/{number}")
        for number, tool in enumerate(tools)
    }
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, arguments_key: {"$ref": f"#/$defs/{number}"}},
            "required": ["name", arguments_key],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    return {"$defs": parameters, "anyOf": calls}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose root is now at `place` of another one."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
