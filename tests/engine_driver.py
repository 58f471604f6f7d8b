"""Runs an in-process engine over requests and collects what came out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from heddle_adapters.mix import AdapterPart
from heddle_server.engine.engine import Engine
from heddle_server.messages import TokenOutput
from heddle_server.request import Request, SamplingParams

_request_ids = count(1)


@dataclass
class Answer:
    """Everything one request was answered."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)  # one [vocabulary] per token when all were asked for
    finish_reason: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    num_cached_tokens: int = 0

    def take(self, output: TokenOutput) -> None:
        self.token_ids += output.token_ids
        self.finish_reason = output.finish_reason
        self.error_code, self.error_message = output.error_code, output.error_message
        self.num_cached_tokens = output.num_cached_tokens
        for described in output.logprobs or ():
            row = torch.full((max(token for token, _ in described.top) + 1,), -torch.inf)
            for token, logprob in described.top:
                row[token] = logprob
            self.logprobs.append(row)


def make_request(
    prompt: list[int],
    adapter: str | tuple[AdapterPart, ...] | None = None,
    *,
    max_tokens: int = 8,
    salt: bytes = b"",
    **sampling: object,
) -> Request:
    options: dict[str, object] = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return Request(
        request_id=next(_request_ids),
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **options),  # type: ignore[arg-type]
        adapters=(AdapterPart(adapter),) if isinstance(adapter, str) else adapter or (),
        cache_salt=salt,
    )


def run(engine: Engine, requests: list[Request], max_steps: int = 20_000) -> list[Answer]:
    """Add all, step until all have ended, check integrity after every step."""
    answers = {request.request_id: Answer(request) for request in requests}
    for request in requests:
        engine.add(request)
    for _ in range(max_steps):
        num_steps = engine.num_steps
        for output in engine.step():
            answers[output.request_id].take(output)
        if engine.num_steps == num_steps:
            time.sleep(0.001)  # let the loader thread work
        engine.check_integrity()
        if not engine.has_requests:
            return list(answers.values())
    raise AssertionError(f"requests still there after {max_steps} steps: {engine.stats()}")
