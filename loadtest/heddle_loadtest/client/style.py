"""How a request names its adapter, server by server. Knows the few body fields involved, nothing else of a request.

What each server takes was read in its own documentation or source, named beside each style (November 2026).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.names import BASE


class Style(StrEnum):
    """The convention by which the target picks an adapter."""

    HEDDLE = "heddle"  # an `adapter` field beside `model`
    VLLM = "vllm"  # the adapter's name as `model` (vLLM, docs/features/lora.md)
    SGLANG = "sglang"  # `model` is "base:adapter" (SGLang, examples/runtime/lora.py); `lora_path` is its older way
    LORAX = "lorax"  # the adapter's id as `model`, "" for the base (LoRAX, docs/reference/openai_api.md)
    LLAMACPP = "llamacpp"  # `lora`: by number, as GET /lora-adapters counts (llama.cpp, tools/server/README.md)

    @property
    def lists_adapters(self) -> bool:
        """Whether the server can be asked which adapters it has. LoRAX fetches them when they are asked for."""
        return self is not Style.LORAX

    @property
    def takes_token_ids(self) -> bool:
        """Whether the prompt of a plain completion may be token ids; LoRAX's is a string (router/src/lib.rs)."""
        return self is not Style.LORAX

    @property
    def takes_uploads(self) -> bool:
        """Whether adapters can be uploaded over HTTP while the server runs."""
        return self is Style.HEDDLE

    @property
    def ignore_eos_field(self) -> str:
        """The body field that asks to go on after an end-of-sequence token.

        `ignore_eos` everywhere but in LoRAX, which calls it `ignore_eos_token` (router/src/lib.rs).
        """
        return "ignore_eos_token" if self is Style.LORAX else "ignore_eos"

    def adapter_fields(self, adapter: str, model: str | None) -> dict[str, Any]:
        """The body fields that select `adapter`; `model` is the base model, or None to leave it to the server.

        With llama.cpp an adapter is named by its number. Adapters that a request leaves out have no part in it, but
        an empty list counts as none given, so the base is asked for by setting the first one's scale to 0.
        Raises SpecError for a name that is none of its numbers.
        """
        is_base = adapter in (BASE, model)
        model_field = {} if model is None else {"model": model}
        match self:
            case Style.HEDDLE:
                return model_field if is_base else model_field | {"adapter": adapter}
            case Style.VLLM:
                return model_field if is_base else {"model": adapter}
            case Style.SGLANG:
                return model_field if is_base else {"model": f"{model or ''}:{adapter}"}
            case Style.LORAX:
                return {"model": "" if is_base else adapter}
            case Style.LLAMACPP:
                part = {"id": 0, "scale": 0.0} if is_base else {"id": _number(adapter), "scale": 1.0}
                return model_field | {"lora": [part]}


def _number(adapter: str) -> int:
    if not (adapter.isascii() and adapter.isdecimal()):
        problem = "is no number, and llama.cpp knows its adapters by the numbers of GET /lora-adapters"
        raise SpecError("adapters", adapter, problem, "Name them 0, 1 and so on, or --set 'adapters.name=\"{index}\"'")
    return int(adapter)
