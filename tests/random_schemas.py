"""Random JSON schemas whose every value is of bounded length: what a model can write, it can finish."""

from __future__ import annotations

from random import Random
from typing import Any

Schema = dict[str, Any]

MAX_DEPTH = 3
PATTERNS = ("^[A-Z][a-z]{1,6}$", "^[0-9]{3}-[0-9]{4}$", "^(yes|no|maybe)$", "^x{2,5}$")
FORMATS = ("date", "uuid", "ipv4")  # not "time": whether a 60th second was a leap second no grammar can tell


def random_schema(source: Random) -> Schema:
    """An object or an array, perhaps with definitions that it refers to."""
    schema = _object(source, 0) if source.random() < 0.8 else _array(source, 0)
    if source.random() < 0.3 and schema["type"] == "object":
        schema["$defs"] = {"shared": _object(source, MAX_DEPTH - 1)}
        for name in ("left", "right"):
            schema["properties"][name] = {"$ref": "#/$defs/shared"}
        schema["required"] = [*schema["required"], "left"]
    return schema


def _value(source: Random, depth: int) -> Schema:
    kinds = [_string, _integer, _number, _boolean, _enum, _const, _pattern, _format, _null]
    if depth < MAX_DEPTH:
        kinds += [_object, _object, _array, _any_of]
    return source.choice(kinds)(source, depth)


def _object(source: Random, depth: int) -> Schema:
    names = source.sample(["name", "size", "colour", "day", "sum", "is_big", "parts", "été"], source.randrange(0, 5))
    return {
        "type": "object",
        "properties": {name: _value(source, depth + 1) for name in names},
        "required": [name for name in names if source.random() < 0.6],
        "additionalProperties": False,
    }


def _array(source: Random, depth: int) -> Schema:
    shortest = source.randrange(0, 3)
    longest = shortest + source.randrange(0, 3)
    return {"type": "array", "items": _value(source, depth + 1), "minItems": shortest, "maxItems": longest}


def _any_of(source: Random, depth: int) -> Schema:
    return {"anyOf": [_value(source, depth + 1) for _ in range(source.randrange(2, 4))]}


def _string(source: Random, depth: int) -> Schema:
    return {"type": "string", "minLength": source.randrange(0, 3), "maxLength": source.randrange(3, 16)}


def _integer(source: Random, depth: int) -> Schema:
    low = source.randrange(-100, 100)
    return {"type": "integer", "minimum": low, "maximum": low + source.randrange(0, 1000)}


def _number(source: Random, depth: int) -> Schema:
    return {"type": "number", "multipleOf": 0.5, "minimum": -10, "exclusiveMaximum": source.randrange(1, 50)}


def _boolean(source: Random, depth: int) -> Schema:
    return {"type": "boolean"}


def _null(source: Random, depth: int) -> Schema:
    return {"type": source.choice(["null", ["null", "boolean"]])}


def _enum(source: Random, depth: int) -> Schema:
    return {"enum": source.sample(["red", "green", 5, None, True, 'a "quoted" word', 2.5], 3)}


def _const(source: Random, depth: int) -> Schema:
    return {"const": source.choice(["fixed", 7, [1, 2], {"a": None}])}


def _pattern(source: Random, depth: int) -> Schema:
    return {"type": "string", "pattern": source.choice(PATTERNS)}


def _format(source: Random, depth: int) -> Schema:
    return {"type": "string", "format": source.choice(FORMATS)}
