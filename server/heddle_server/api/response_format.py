"""`response_format`: what an answer has to be, and the grammar that holds it to that."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from llguidance import LLMatcher
from pydantic import ConfigDict, Discriminator, Field, Tag

from heddle_server.api.wire_fields import JsonSchema, WireModel
from heddle_server.grammar_compiler import MAX_GRAMMAR_BYTES

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# One way to space JSON out, the one that models have seen most: otherwise an answer may be spaces without end.
_SPACING: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class TextFormat(WireModel):
    """Anything."""

    type: Literal["text"]

    @property
    def grammar(self) -> str | None:
        return None


class JsonObjectFormat(WireModel):
    """Any JSON object."""

    type: Literal["json_object"]

    @property
    def grammar(self) -> str | None:
        return schema_grammar({"type": "object"})


class NamedSchema(WireModel):
    """A JSON schema, as OpenAI wraps it."""

    model_config = ConfigDict(**WireModel.model_config, populate_by_name=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str | None, Field(max_length=MAX_GRAMMAR_BYTES)] = None
    json_schema: Annotated[JsonSchema, Field(alias="schema")]
    strict: Annotated[bool | None, Field(description="Answers follow the schema either way.")] = None


class JsonSchemaFormat(WireModel):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def grammar(self) -> str | None:
        return schema_grammar(self.json_schema.json_schema)


class GrammarFormat(WireModel):
    """Text that a regular expression or a Lark grammar describes, in the form OpenAI gives custom tools."""

    type: Literal["grammar"]
    syntax: Literal["regex", "lark"]
    definition: Annotated[str, Field(min_length=1)]

    @property
    def grammar(self) -> str | None:
        if self.syntax == "lark":
            return LLMatcher.grammar_from_lark(self.definition)
        return LLMatcher.grammar_from_regex(self.definition)


FORMAT_TYPES = ("text", "json_object", "json_schema", "grammar")
# What pydantic puts into an error's location for the forms; nothing that a client wrote.
FORMAT_FORMS = tuple(f"<{kind}>" for kind in FORMAT_TYPES)


def format_form(value: object) -> str | None:
    """Which of `FORMAT_FORMS` a value has, by its type."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in FORMAT_TYPES else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag(FORMAT_FORMS[0])]
    | Annotated[JsonObjectFormat, Tag(FORMAT_FORMS[1])]
    | Annotated[JsonSchemaFormat, Tag(FORMAT_FORMS[2])]
    | Annotated[GrammarFormat, Tag(FORMAT_FORMS[3])],
    Discriminator(
        format_form,
        custom_error_type="invalid_value",
        custom_error_message=f"response_format needs a 'type', one of {', '.join(FORMAT_TYPES)}",
    ),
]


def schema_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON by this schema, as llguidance reads it; raises `ValueError` for what it cannot read."""
    closed = schema if _has_any(schema, _INTERSECTING) else _closed(schema)
    return LLMatcher.grammar_from_json_schema(closed, overrides=_SPACING)


# Keywords that look at an object beside its own `properties`.
_INTERSECTING = frozenset({"allOf", "not", "if", "dependentSchemas", "unevaluatedProperties"})
_OTHER_PROPERTIES = frozenset({"additionalProperties", "patternProperties", "$ref", "anyOf", "oneOf"})
_SCHEMA_MAPS = frozenset({"properties", "$defs", "definitions"})
_SCHEMAS = frozenset({"items", "prefixItems", "anyOf", "oneOf", "additionalProperties"})


def _closed(schema: Any) -> Any:
    """The same schema without properties that nobody named, where it says nothing of them.

    Whatever follows it follows the schema too; and small models make up properties until they have no tokens left.
    """
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for keyword, value in schema.items():
        if keyword in _SCHEMA_MAPS and isinstance(value, dict):
            closed[keyword] = {name: _closed(each) for name, each in value.items()}
        elif keyword in _SCHEMAS:
            closed[keyword] = _closed(value)
    if isinstance(schema.get("properties"), dict) and not _OTHER_PROPERTIES & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _has_any(schema: Any, keywords: frozenset[str]) -> bool:
    if isinstance(schema, list):
        return any(_has_any(each, keywords) for each in schema)
    if not isinstance(schema, dict):
        return False
    return bool(keywords & schema.keys()) or any(_has_any(each, keywords) for each in schema.values())


def within(grammar: str, start: str) -> str:
    """The same grammar with something around it: `start` is a Lark grammar that means it by `@answer`."""
    parts = json.loads(grammar)["grammars"]
    name = f"answer{len(parts)}"  # which no part has, however often this is done
    whole = {"lark_grammar": start.replace("@answer", f"@{name}")}
    return json.dumps({"grammars": [whole, {**parts[0], "name": name}, *parts[1:]]})
