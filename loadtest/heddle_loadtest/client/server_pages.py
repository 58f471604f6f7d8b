"""What a server is asked beside completions: its models and adapters, its metrics, to take or drop an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp

from heddle_loadtest.client.answer import read_error_body
from heddle_loadtest.client.result import RequestError, describe
from heddle_loadtest.client.target import Target
from heddle_loadtest.errors import TargetError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # what PEFT writes and heddle takes

_T = TypeVar("_T")
_TIMEOUT = aiohttp.ClientTimeout(total=30.0, sock_connect=10.0)
_METRICS_TIMEOUT = aiohttp.ClientTimeout(total=5.0)  # the run's end waits for the last one
_UPLOAD_TIMEOUT = aiohttp.ClientTimeout(total=600.0, sock_connect=10.0)


class ServerPages:
    """The pages of one target, asked through a session that is open."""

    def __init__(self, target: Target, session: aiohttp.ClientSession) -> None:
        self._target = target
        self._session = session

    async def list_models(self) -> tuple[str, ...]:
        """The ids that `GET /v1/models` lists, in the server's order.

        Raises TargetError if the server is down, refuses the key, or answers in another shape than OpenAI's.
        """
        return await self._get("/v1/models", _read_model_ids, "no OpenAI model list")

    async def list_adapter_numbers(self) -> tuple[str, ...]:
        """The adapters that llama.cpp counts at `GET /lora-adapters`. Raises TargetError as `list_models` does."""
        return await self._get("/lora-adapters", _read_adapter_numbers, "no list of numbered adapters")

    async def served_model(self) -> str | None:
        """The base model that LoRAX names at `GET /info`. Raises TargetError as `list_models` does."""
        return await self._get("/info", _read_info, "no LoRAX information")

    async def metrics(self) -> str | None:
        """The text of `GET /metrics`, or None if there is none now."""
        try:
            async with self._session.get(f"{self._target.base_url}/metrics", timeout=_METRICS_TIMEOUT) as response:
                return (await response.read()).decode("utf-8", "replace") if response.status == 200 else None
        except (TimeoutError, aiohttp.ClientError):
            return None

    async def upload(self, adapter: str, folder: Path) -> tuple[int | None, RequestError | None]:
        """Uploads the PEFT adapter in `folder` under the name `adapter`: the HTTP status, and what went wrong."""
        form = aiohttp.FormData()
        form.add_field("name", adapter)
        address = f"{self._target.base_url}/v1/adapters"
        try:
            with ExitStack() as files:
                for name in ADAPTER_FILES:  # as files, which aiohttp reads piece by piece in a thread of its own
                    form.add_field(name, files.enter_context((folder / name).open("rb")), filename=name)
                async with self._session.post(address, data=form, timeout=_UPLOAD_TIMEOUT) as response:
                    body = (await response.read()).decode("utf-8", "replace")
                    return response.status, None if response.ok else read_error_body(response.status, body)
        except TimeoutError as error:
            return None, RequestError("timeout", describe(error))
        except aiohttp.ClientError as error:
            return None, RequestError("connection_failed", describe(error))
        except OSError as error:
            return None, RequestError("unreadable_file", describe(error))

    async def delete(self, adapter: str) -> bool:
        """Takes an adapter away again; whether it was done."""
        try:
            address = f"{self._target.base_url}/v1/adapters/{quote(adapter, safe='')}"
            async with self._session.delete(address, timeout=_TIMEOUT) as response:
                return response.ok
        except (TimeoutError, aiohttp.ClientError):
            return False

    async def _get(self, path: str, read: Callable[[Any], _T], problem: str) -> _T:
        """What `read` makes of the JSON at `path`; it raises ValueError if that is of another shape."""
        url = self._target.base_url
        try:
            async with self._session.get(url + path, timeout=_TIMEOUT) as response:
                if response.status in (401, 403):
                    remedy = "Pass a key that this server accepts"
                    raise TargetError("api_key", None, f"{url} refuses it (HTTP {response.status})", remedy)
                if response.status != 200:
                    raise self._is_another(f"GET {path} answers HTTP {response.status}")
                return read(json.loads(await response.read()))
        except (ValueError, RecursionError):
            raise self._is_another(f"GET {path} answers {problem}") from None
        except (TimeoutError, aiohttp.ClientError) as error:
            remedy = "Start the server, or correct the address"
            raise TargetError("target", url, f"no answer from there ({describe(error)})", remedy) from error

    def _is_another(self, problem: str) -> TargetError:
        remedy = "Point it at an OpenAI-compatible server, for example http://127.0.0.1:8000, of the style you give"
        return TargetError("target", self._target.base_url, problem, remedy)


def _read_model_ids(listing: object) -> tuple[str, ...]:
    entries = listing.get("data") if isinstance(listing, dict) else None
    return _read_each(entries, "id")


def _read_adapter_numbers(listing: object) -> tuple[str, ...]:
    return _read_each(listing, "id")


def _read_info(info: object) -> str | None:
    if not isinstance(info, dict) or "model_id" not in info:
        raise ValueError("no information")
    return str(info["model_id"])


def _read_each(entries: object, key: str) -> tuple[str, ...]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and key in entry for entry in entries):
        raise ValueError("no list")
    return tuple(str(entry[key]) for entry in entries)
