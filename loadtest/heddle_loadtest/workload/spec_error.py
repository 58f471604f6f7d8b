"""What msgspec says is wrong with a setting, said in the words of the YAML file. Knows no files and no keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from heddle_loadtest.errors import SpecError

_STEP = re.compile(r"\.(?P<key>[^.\[\]]+)|\[(?P<index>\d+)\]")
_UNKNOWN_KEY = re.compile(r"Object contains unknown field `(?P<key>.*)`")
_MISSING_KEY = re.compile(r"Object missing required field `(?P<key>.*)`")

Converted = TypeVar("Converted")


def convert(value: Any, wanted: type[Converted], field: str = "") -> Converted:
    """`value` as a `wanted`. `field` is the dotted key it stands under. Raises SpecError with the key that is wrong."""
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise _explain(str(error), value, wanted, field) from error


def choose_from(given: str, known: Iterable[str]) -> str:
    """What to do about a name that is not among the known ones: the nearest first."""
    names = sorted(known)
    nearest = difflib.get_close_matches(given, names, n=1)
    return (f"Did you mean `{nearest[0]}`? " if nearest else "") + f"Known: {', '.join(names)}"


def _explain(message: str, value: Any, wanted: type, field: str) -> SpecError:
    problem, _, path = message.partition(" - at `$")
    known_path = path.rstrip("`").partition("[...]")[0]  # msgspec does not say which key of a mapping it means
    steps = [match["key"] or int(match["index"]) for match in _STEP.finditer(known_path)]
    type_, found = _follow(inspect.type_info(wanted), value, steps)
    dotted = ".".join(map(str, [*filter(None, [field]), *steps]))
    if unknown := _UNKNOWN_KEY.match(problem):
        key = unknown["key"]
        return SpecError(f"{dotted}.{key}".lstrip("."), None, "is no key here", choose_from(key, _keys(type_)))
    if missing := _MISSING_KEY.match(problem):
        key = missing["key"]
        remedy = f"Kinds: {', '.join(_kinds(type_))}" if key == "kind" else f"Give {dotted}.{key}".replace(" .", " ")
        return SpecError(dotted or "workload", None, f"lacks the key `{key}`", remedy)
    if steps and steps[-1] == "kind":
        return SpecError(dotted, found, "is no kind of this", choose_from(str(found), _kinds(type_)))
    if problem.startswith(("Expected", "Invalid")):
        shown = "nothing" if found is None else found
        return SpecError(dotted or "workload", shown, f"must be {_describe(type_)}", "Give one")
    return SpecError(dotted or "workload", None, problem, "Correct it")


def _follow(type_: inspect.Type, value: Any, steps: Iterable[str | int]) -> tuple[inspect.Type, Any]:
    """What is wanted and what stands there, some steps further in; of several kinds, the one given is wanted."""
    for step in steps:
        chosen = _choose(type_, value)
        value = value.get(step) if isinstance(value, dict) else value[step] if isinstance(step, int) else None
        if isinstance(chosen, inspect.StructType) and step != "kind":
            type_ = next(field.type for field in chosen.fields if field.name == step)
        elif isinstance(chosen, inspect.VarTupleType):
            type_ = chosen.item_type
    return (type_, value) if isinstance(value, str) else (_choose(type_, value), value)


def _choose(type_: inspect.Type, value: Any) -> inspect.Type:
    """The kind of a union that `value` says it is; the union if it is none."""
    for kind in _structs(type_):
        if isinstance(value, dict) and kind.tag == value.get("kind"):
            return kind
    return type_


def _structs(type_: inspect.Type) -> list[inspect.StructType]:
    types = type_.types if isinstance(type_, inspect.UnionType) else (type_,)
    return [one for one in types if isinstance(one, inspect.StructType)]


def _keys(type_: inspect.Type) -> list[str]:
    return [
        key
        for kind in _structs(type_)
        for key in [*([] if kind.tag is None else ["kind"]), *(field.name for field in kind.fields)]
    ]


def _kinds(type_: inspect.Type) -> list[str]:
    return sorted(str(kind.tag) for kind in _structs(type_) if kind.tag is not None)


def _describe(type_: inspect.Type) -> str:
    match type_:
        case inspect.UnionType(types=types):
            plain = [_describe(one) for one in types if not isinstance(one, inspect.StructType)]
            mapping = "a mapping with a `kind`" if _kinds(type_) else "a mapping of keys to values"
            return " or ".join(plain + ([mapping] if _structs(type_) else []))
        case inspect.IntType():
            return "a whole number" + _limits(type_)
        case inspect.FloatType():
            return "a number" + _limits(type_)
        case inspect.StrType(pattern=pattern):
            return "text" if pattern is None else f"text like {pattern}"
        case inspect.BoolType():
            return "true or false"
        case inspect.NoneType():
            return "null"
        case inspect.VarTupleType(item_type=item, min_length=least):
            return f"a list{f' of {least} or more' if least else ''}, each {_describe(item)}"
        case _:
            return "a mapping of keys to values"


def _limits(number: inspect.IntType | inspect.FloatType) -> str:
    limits = [
        f"{words} {limit:,.0f}"
        for words, limit in ((" above", number.gt), (" from", number.ge), (" up to", number.le))
        if limit is not None
    ]
    return "".join(limits)
