"""A request as the engine sees it: token ids and sampling parameters, no text and no HTTP."""

from __future__ import annotations

import msgspec

from heddle_adapters.mix import AdapterPart, adapter_key

MAX_LOGPROBS = 20
LOCAL_TENANT = "local"  # the only tenant until there are keys


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when to stop. The API process has validated the ranges."""

    max_tokens: int  # tokens to generate at most, >= 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 = all tokens
    seed: int = 0  # with the position decides every draw; the API process draws one if the client gave none
    stop_token_ids: tuple[int, ...] = ()  # beside the model's own end-of-sequence ids
    ignore_eos: bool = False
    num_logprobs: int | None = None  # None = no logprobs; 0 = the chosen token's only; at most MAX_LOGPROBS


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One generation, bound to its adapter's content at admission."""

    request_id: int  # made by the server, never by the client
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapters: tuple[AdapterPart, ...] = ()  # none = the base; several = their sum
    tenant: str = LOCAL_TENANT  # whose fair share of the engine it uses
    cache_salt: bytes = b""  # keeps the prefix cache of one tenant apart from another's

    @property
    def adapter_key(self) -> str:
        """Identity of the adapter or mix; "" is the base."""
        return adapter_key(self.adapters)
