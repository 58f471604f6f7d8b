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
    min_p: float = 0.0  # [0, 1]: only tokens at least this fraction as likely as the likeliest
    seed: int = 0  # with the position decides every draw; the API process draws one if the client gave none
    stop_token_ids: tuple[int, ...] = ()  # beside the model's own end-of-sequence ids
    ignore_eos: bool = False
    min_tokens: int = 0  # before it nothing ends the answer but its grammar; at most max_tokens
    presence_penalty: float = 0.0  # taken once from the logit of every token of the answer so far
    frequency_penalty: float = 0.0  # taken as often as the answer has the token
    repetition_penalty: float = 1.0  # > 0: positive logits of tokens of prompt and answer over it, negative times it
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    grammar: str | None = None  # what the answer must follow, as llguidance writes grammars
    num_logprobs: int | None = None  # None = no logprobs; 0 = the chosen token's only; at most MAX_LOGPROBS
    num_prompt_logprobs: int | None = None  # the same for the prompt's own tokens, but for the first

    @property
    def reads_tokens(self) -> bool:
        """Whether the next token can only be chosen by who knows all those before it."""
        has_penalty = bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0
        return has_penalty or self.grammar is not None

    @property
    def changes_logits(self) -> bool:
        """Whether the model's logits are not what is drawn from."""
        return self.reads_tokens or bool(self.logit_bias) or self.min_tokens > 0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One generation, bound to its adapter's content at admission."""

    request_id: int  # made by the server, never by the client
    prompt_token_ids: list[int]  # as the client knows them: without virtual ones
    sampling: SamplingParams
    adapters: tuple[AdapterPart, ...] = ()  # none = the base; several = their sum
    num_virtual_tokens: int = 0  # that the adapter puts before the prompt
    tenant: str = LOCAL_TENANT  # whose fair share of the engine it uses
    cache_salt: bytes = b""  # keeps the prefix cache of one tenant apart from another's

    @property
    def adapter_key(self) -> str:
        """Identity of the adapter or mix; "" is the base."""
        return adapter_key(self.adapters)
