"""`python -m heddle_server.api_page > docs/api.md`: the API as a page, made from what `/openapi.json` says."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from heddle_server.api.app import api_document
from heddle_server.api.errors import KINDS
from heddle_server.api.openapi import STREAM_TYPE

Json = dict[str, Any]

INTRODUCTION = """# API

<!-- Made by `python -m heddle_server.api_page > docs/api.md`; a test holds this page to the code. -->

{description}
The same is at `/openapi.json` of every server, for programs, and at `/docs`, to look at and to try.
"""


def page() -> str:
    """The whole page."""
    document = api_document()
    return "\n".join(
        [
            INTRODUCTION.format(description=document["info"]["description"]),
            *_tags(document),
            *_errors(),
            *_headers(document["components"]["headers"]),
            *_types(document["components"]["schemas"]),
        ]
    )


def _tags(document: Json) -> Iterator[str]:
    for tag in document["tags"]:
        yield f"## {tag['name'].capitalize()}\n\n{tag['description']}\n"
        for path, item in document["paths"].items():
            for method, operation in item.items():
                if operation["tags"] == [tag["name"]]:
                    yield from _operation(f"{method.upper()} {path}", operation)


def _operation(title: str, operation: Json) -> Iterator[str]:
    yield f"### `{title}`\n\n{operation['description']}\n"
    needed = [scope for each in operation.get("security", ()) for scopes in each.values() for scope in scopes]
    yield f"Needs a key with the scope `{needed[0]}`.\n" if needed else "Needs no key.\n"
    if parameters := operation.get("parameters"):
        rows = [
            _field(each["name"], {"description": "", **each, **each["schema"]}, each["required"]) for each in parameters
        ]
        yield _table("Parameter", rows)
    for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
        if "$ref" in body["schema"]:
            yield f"Takes {_kind(body['schema'])}.\n"
        else:
            yield f"Takes a form, `{media_type}`:\n"
            yield _fields(body["schema"])
        if body.get("example"):
            yield f"```json\n{json.dumps(body['example'])}\n```\n"
    yield "| Status | |\n|---|---|"
    for status, response in operation["responses"].items():
        yield f"| {status} | {_told(response) if int(status) < 400 else _codes(response)} |"
    yield ""


def _told(response: Json) -> str:
    parts = []
    for media_type, content in response["content"].items():
        if media_type == STREAM_TYPE:
            data = content["itemSchema"]["properties"]["data"]
            events = [each["contentSchema"] for each in data.get("anyOf", [data]) if "contentSchema" in each]
            parts.append(f"or, with `stream`, events: {' or '.join(map(_kind, events))}")
        else:
            parts.append(_kind(content["schema"]) if "$ref" in content["schema"] else f"`{media_type}`")
    return f"{response['description']} {', '.join(parts)}"


def _codes(response: Json) -> str:
    _, own = response["content"]["application/json"]["schema"]["allOf"]
    return ", ".join(f"`{code}`" for code in own["properties"]["error"]["properties"]["code"]["enum"])


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield "| Code | Status | |\n|---|---|---|"
    for error, kind in sorted(KINDS.items(), key=lambda pair: pair[1].status):
        if error is not Exception:
            yield f"| `{kind.code}` | {kind.status} | {_line(inspect.getdoc(error) or '')} |"
    yield ""


def _headers(headers: Json) -> Iterator[str]:
    yield "## Headers of replies\n"
    yield "| Header | |\n|---|---|"
    yield from (f"| `{name}` | {header['description']} |" for name, header in headers.items())
    yield ""


def _types(schemas: Json) -> Iterator[str]:
    yield "## Types\n"
    for name, schema in schemas.items():
        yield f"### {name}\n\n{schema['description']}\n"
        yield _fields(schema)


def _fields(schema: Json) -> str:
    required = schema.get("required", ())
    return _table("Field", [_field(name, field, name in required) for name, field in schema["properties"].items()])


def _field(name: str, schema: Json, is_required: bool) -> tuple[str, str, str]:
    said = [schema.get("description", "")]
    if schema.get("default") is not None:
        said.append(f"Default: `{json.dumps(schema['default'])}`.")
    return f"`{name}`" + (" (required)" if is_required else ""), _kind(schema), " ".join(filter(None, said))


def _table(title: str, rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| {title} | May be | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows), ""])


def _kind(schema: Json) -> str:
    """A schema's values, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{json.dumps(each)}`" for each in schema.get("enum", [schema.get("const")]))
    if branches := schema.get("anyOf") or schema.get("oneOf"):
        around = {name: value for name, value in schema.items() if name not in ("anyOf", "oneOf")}
        return " or ".join(dict.fromkeys(_kind({**around, **each}) for each in branches))
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join(_kind({**schema, "type": each}) for each in kind)
    return " ".join(filter(None, [_named(kind, schema), _bounds(kind, schema)]))


def _named(kind: str, schema: Json) -> str:
    match kind:
        case "array":
            return f"list of {_kind(schema['items'])}" if "items" in schema else "list"
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return f"object of {_kind(schema['additionalProperties'])}"
        case "object" if "properties" in schema:
            return f"object with {', '.join(f'`{name}`' for name in schema['properties'])}"
        case _:
            return kind


_RANGES = {
    "integer": ("minimum", "maximum", ""),
    "number": ("minimum", "maximum", ""),
    "string": ("minLength", "maxLength", " characters"),
    "array": ("minItems", "maxItems", " items"),
    "object": ("minProperties", "maxProperties", " entries"),
}


def _bounds(kind: str, schema: Json) -> str:
    """Of a value's size, or of the value itself."""
    if kind not in _RANGES:
        return ""
    least_name, most_name, what = _RANGES[kind]
    least, most = schema.get(least_name), schema.get(most_name)
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    said = []
    if least is not None and most is not None:
        said.append(f"{least} to {most}{what}")
    else:
        limits = {"at least": least, "above": above, "at most": most, "below": below}
        said += [f"{word} {limit}{what}" for word, limit in limits.items() if limit is not None]
    if kind == "string" and "pattern" in schema:
        said.append(f"`{schema['pattern']}`")
    return f"({', '.join(said)})" if said else ""


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(page(), end="")
