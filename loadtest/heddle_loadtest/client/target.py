"""The server that is put under load, and whether it has what a run asks for. Sends no chat request."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from heddle_loadtest.client.style import Style
from heddle_loadtest.errors import SpecError, TargetError
from heddle_loadtest.workload.names import BASE

if TYPE_CHECKING:
    from heddle_loadtest.client.chat_client import ChatClient

_NUM_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One server. Raises SpecError, which names the field, if a value is out of range."""

    url: str  # with or without the final /v1; printed, and written into reports
    style: Style = Style.HEDDLE  # how a request names its adapter
    model: str | None = None  # the base model; None: the first that the target lists
    api_key: str | None = field(default=None, repr=False)  # sent as a bearer token, never shown
    timeout_seconds: float = 600.0  # for one request, from start to end

    def __post_init__(self) -> None:
        _check_url(self.url)
        if not (math.isfinite(self.timeout_seconds) and self.timeout_seconds > 0):
            remedy = "Give a positive number of seconds"
            raise SpecError("timeout_seconds", self.timeout_seconds, "must be more than 0", remedy)
        if self.api_key is not None:
            check_api_key("api_key", self.api_key)

    @property
    def base_url(self) -> str:
        """The address that paths such as `/v1/models` and `/metrics` are appended to."""
        return self.url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedTarget:
    """What a target turned out to have."""

    model: str | None  # the base model's name; None where the server has none (LoRAX without /info)
    adapters: tuple[str, ...]  # all it lists, in its order
    missing: tuple[str, ...] = ()  # asked for, not listed, and among the supplied ones: to be uploaded
    warnings: tuple[str, ...] = ()


def check_api_key(field: str, key: str) -> None:
    """Raises SpecError if no HTTP header can carry it: aiohttp would say so with the key in its message."""
    if not (key.isascii() and key.isprintable()):
        raise SpecError(field, None, "holds a character that no HTTP header may have", "Copy the key again")


async def check_target(client: ChatClient, adapters: Iterable[str], supplied: Collection[str] = ()) -> CheckedTarget:
    """What the client's target has, for a run that asks for `adapters`; those in `supplied` may be missing yet.

    Raises TargetError if the target is down, is no OpenAI server, or lacks the model or an adapter.
    """
    target = client.target
    if not target.style.lists_adapters:
        warning = f"{target.style} does not list its adapters: whether it has them shows in the answers"
        return CheckedTarget(model=target.model or await client.pages.served_model(), adapters=(), warnings=(warning,))
    models = await client.list_models()
    if not models:
        raise TargetError("target", target.url, "lists no models", "Let the server load a model first")
    model = models[0] if target.model is None else target.model
    if model not in models:
        raise _lacks("model", [model], models)
    listed = await _list_adapters(client, [name for name in models if name != model])
    absent = [name for name in dict.fromkeys(adapters) if not _is_there(name, model, listed, target.style)]
    unavailable = [name for name in absent if name not in supplied]
    if unavailable:
        raise _lacks("adapters", unavailable, (BASE, *listed))
    return CheckedTarget(model=model, adapters=tuple(listed), missing=tuple(absent))


async def _list_adapters(client: ChatClient, models: Sequence[str]) -> Sequence[str]:
    return await client.pages.list_adapter_numbers() if client.target.style is Style.LLAMACPP else models


def _is_there(name: str, model: str, listed: Sequence[str], style: Style) -> bool:
    if name in (BASE, model) or name in listed:
        return True
    stem, separator, _ = name.partition("@")  # heddle's name@version, of which only the name is listed
    return style is Style.HEDDLE and bool(separator) and stem in listed


def _lacks(field: str, names: Sequence[str], available: Sequence[str]) -> TargetError:
    others = f", nor {len(names) - 1} more that the run asks for" if len(names) > 1 else ""
    nearest = difflib.get_close_matches(names[0], available, n=_NUM_NAMES_SHOWN) or available[:_NUM_NAMES_SHOWN]
    more = f" and {len(available) - len(nearest)} more" if len(available) > len(nearest) else ""
    return TargetError(field, names[0], f"the target does not list it{others}", f"It has: {', '.join(nearest)}{more}")


def _check_url(text: str) -> None:
    try:
        url = urlsplit(text)
        is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        remedy = "Write it as http://host:port, for example http://127.0.0.1:8000"
        raise SpecError("target", text if "@" not in text else None, "is not an http address", remedy)
    if url.username or url.password:  # the target is printed and goes into reports
        raise SpecError("target", None, "holds a user name or a password", "Pass it as the API key instead")
