"""Reads workloads from YAML and writes them: variants, overrides, the ready-made ones. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import NODEFAULT, Struct

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.consistency import check_workload
from heddle_loadtest.workload.spec import Tenant, Workload
from heddle_loadtest.workload.spec_error import choose_from, convert

Settings = dict[str, Any]  # a workload as YAML has it

_READY_MADE = Path(__file__).parent / "ready_made"
_ALTERNATIVES = frozenset({"names", "count", "listed"})  # of `adapters`: to give one takes the others away


def load_workload(source: str, *, variant: str | None = None, overrides: Sequence[str] = ()) -> Workload:
    """The workload in a YAML file, or the ready-made one of this name.

    `variant` is one of its `variants`, laid over the rest; it is then named after it, and has no variants left.
    `overrides` come last: "arrivals.rate=8", dotted keys with YAML values. Raises SpecError for all that is wrong.
    """
    settings = _read_settings(source)
    if variant is not None:
        settings = _with_variant(settings, variant)
    for override in overrides:
        settings = _merge(settings, _parse_override(override))
    workload = _convert_workload(settings)
    check_workload(workload)
    return workload


def read_ready_made(name: str) -> str:
    """The YAML of a ready-made workload, comments and all."""
    return _read_text(_path_of_ready_made(name))


def list_ready_made() -> tuple[str, ...]:
    """The names that `load_workload` knows without a file."""
    return tuple(sorted(path.stem for path in _READY_MADE.glob("*.yaml")))


def folder_of(source: str) -> Path:
    """What a workload's trace files are relative to: the folder of its own file."""
    return _path_of(source).parent


def dump_workload(workload: Workload) -> str:
    """YAML that loads again to an equal workload; what has its default is left out."""
    return msgspec.yaml.encode(_settings_of(workload)).decode()


# Files ---------------------------------------------------------------------------------------------------------------


def _read_settings(source: str) -> Settings:
    text = _read_text(_path_of(source))
    try:
        settings = msgspec.yaml.decode(text)
    except msgspec.DecodeError as error:
        problem = f"is no YAML: line {_line_number(error)}: {_reason(error)}"
        raise SpecError("workload", source, problem, "Correct that line") from error
    if not isinstance(settings, dict):
        raise SpecError("workload", source, "is no mapping of keys to values", "Write `name: …` and the rest")
    return settings


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = (error.strerror if isinstance(error, OSError) else None) or "is not UTF-8 text"
        raise SpecError("workload", path, problem, "Name a YAML file of UTF-8 text") from error


def _path_of(source: str) -> Path:
    """A path if it looks like one, else a ready-made workload's."""
    path = Path(source)
    is_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.is_file()
    return path if is_path else _path_of_ready_made(source)


def _path_of_ready_made(name: str) -> Path:
    if name in list_ready_made():
        return _READY_MADE / f"{name}.yaml"
    problem = "is neither a YAML file nor a ready-made workload"
    raise SpecError("workload", name, problem, choose_from(name, list_ready_made()))


def _line_number(error: Exception) -> str:
    """PyYAML counts from 0 in its mark, which msgspec hides behind its own error."""
    mark = getattr(error.__context__, "problem_mark", None)
    return "?" if mark is None else str(mark.line + 1)


def _reason(error: Exception) -> str:
    return getattr(error.__context__, "problem", None) or str(error).splitlines()[0]


# Variants and overrides ----------------------------------------------------------------------------------------------


def _with_variant(settings: Settings, variant: str) -> Settings:
    variants = settings.get("variants") or {}
    rest = {key: value for key, value in settings.items() if key != "variants"}
    if "name" in rest:
        rest["name"] = f"{rest['name']}-{variant}"
    if not isinstance(variants, dict) or variant not in variants:
        names = tuple(map(str, variants)) if isinstance(variants, dict) else ()
        remedy = choose_from(variant, names) if names else "It has none: leave the variant out"
        raise SpecError("variant", variant, f"is no variant of {settings.get('name')!r}", remedy)
    chosen = variants[variant] or {}
    if not isinstance(chosen, dict):
        raise SpecError(f"variants.{variant}", chosen, "is no mapping of keys to values", "Write the keys that differ")
    return _merge(rest, chosen)


def _parse_override(override: str) -> Settings:
    keys, equals, text = override.partition("=")
    if not equals or not all(keys.split(".")):
        remedy = "Write it as arrivals.rate=8"
        raise SpecError("set", override, "is no dotted key with a value", remedy)
    try:
        settings = msgspec.yaml.decode(text)
    except msgspec.DecodeError as error:
        raise SpecError(
            "set", override, f"has no YAML value: {_reason(error)}", "Write it as arrivals.rate=8"
        ) from error
    for key in reversed(keys.split(".")):
        settings = {key: settings}
    return dict(settings)


def _merge(old: Settings, new: Mapping[str, Any]) -> Settings:
    """`new` laid over `old`, mapping by mapping; one of another `kind` takes the old one's place."""
    if "kind" in old and "kind" in new and new["kind"] != old["kind"]:
        return dict(new)
    if not _ALTERNATIVES.isdisjoint(new):
        old = {key: value for key, value in old.items() if key not in _ALTERNATIVES}
    merged = {
        key: _merge(old[key], value) if isinstance(old.get(key), dict) and isinstance(value, dict) else value
        for key, value in new.items()
    }
    return old | merged


# To and from structs -------------------------------------------------------------------------------------------------


def _convert_workload(settings: Settings) -> Workload:
    """Tenants on their own first: of a whole workload's errors nobody could say whose they are."""
    tenants = settings.get("tenants")
    for name, tenant in tenants.items() if isinstance(tenants, dict) else ():
        convert(tenant, Tenant, f"tenants.{name}")
    return convert(settings, Workload)


def _settings_of(value: Any) -> Any:
    if isinstance(value, Struct):
        tag = value.__struct_config__.tag
        return ({} if tag is None else {"kind": tag}) | {
            field.name: _settings_of(own)
            for field in msgspec.structs.fields(value)
            if (own := getattr(value, field.name)) != _default_of(field)
        }
    if isinstance(value, Mapping):
        return {key: _settings_of(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_settings_of(part) for part in value]
    return value


def _default_of(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default_factory is NODEFAULT else field.default_factory()
