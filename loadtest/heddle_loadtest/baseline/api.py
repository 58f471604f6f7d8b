"""The OpenAI-compatible HTTP interface of a baseline: models, chat and text completions, streamed or whole.

Every token is an event of its own. Knows no torch: a `Batcher` answers.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from heddle_loadtest.baseline.body import ApiError, Body, ChatBody, CompletionBody, choose_adapter, read_body
from heddle_loadtest.baseline.job import BaselineError, Batcher, Job, StepStream
from heddle_loadtest.baseline.reply import ChatForm, CompletionForm, Reply
from heddle_loadtest.baseline.request import GenerationRequest
from heddle_loadtest.baseline.token_text import TokenText, chat_tokens

MAX_BODY_BYTES = 64 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What there is to ask."""

    model_name: str
    adapters: tuple[str, ...]
    tokenizer: Any  # None: prompts of token ids only
    context_length: int  # tokens of a prompt and its answer
    vocabulary_size: int


class Api:
    """The routes, in front of a batcher."""

    def __init__(self, served: Served, batcher: Batcher) -> None:
        self._served = served
        self._adapters = frozenset(served.adapters)
        self._batcher = batcher

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_envelopes], client_max_size=MAX_BODY_BYTES)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        base = self._served.model_name
        entries = [{"id": base, "object": "model", "created": 0, "owned_by": "heddle-loadtest"}]
        entries += [entries[0] | {"id": name, "parent": base} for name in self._served.adapters]
        return web.json_response({"object": "list", "data": entries})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = read_body(await request.read(), ChatBody)
        adapter = choose_adapter(body, self._served.model_name, self._adapters)
        messages = [{"role": message.role, "content": message.content} for message in body.messages]
        try:
            prompt = chat_tokens(self._tokenizer("messages"), messages)
        except ValueError as error:
            raise ApiError(400, "invalid_messages", f"no prompt can be made of them: {error}", "messages") from error
        return await self._answer(request, body, self._generation(body, adapter, prompt), ChatForm())

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = read_body(await request.read(), CompletionBody)
        adapter = choose_adapter(body, self._served.model_name, self._adapters)
        prompt = body.prompt if isinstance(body.prompt, list) else self._tokenizer("prompt")(body.prompt)["input_ids"]
        return await self._answer(request, body, self._generation(body, adapter, prompt), CompletionForm())

    def _tokenizer(self, param: str) -> Any:
        if self._served.tokenizer is None:
            message = "the base has no tokenizer here: send token ids as the `prompt` of /v1/completions"
            raise ApiError(400, "no_tokenizer", message, param)
        return self._served.tokenizer

    def _generation(self, body: Body, adapter: str | None, prompt: list[int]) -> GenerationRequest:
        limit, vocabulary = self._served.context_length, self._served.vocabulary_size
        if not prompt:
            raise ApiError(400, "empty_prompt", "the prompt has no tokens", "prompt")
        num_tokens = len(prompt) + body.num_new_tokens
        if num_tokens > limit:
            message = f"prompt and answer may come to {num_tokens} tokens, and {limit} is the most"
            raise ApiError(400, "context_length_exceeded", message, "max_tokens")
        if not all(0 <= token < vocabulary for token in prompt):
            raise ApiError(400, "invalid_token_id", f"token ids are from 0 to {vocabulary - 1}", "prompt")
        return GenerationRequest(
            prompt=prompt, adapter=adapter, max_tokens=body.num_new_tokens, ignore_eos=bool(body.ignore_eos)
        )

    async def _answer(
        self, request: web.Request, body: Body, generation: GenerationRequest, form: ChatForm | CompletionForm
    ) -> web.StreamResponse:
        stream = StepStream()
        reply = Reply(
            form, generation, TokenText(self._served.tokenizer), generation.adapter or self._served.model_name
        )
        self._batcher.submit(Job(generation, stream))
        try:
            if body.stream:
                return await _stream(request, reply, stream, wants_usage=body.wants_usage)
            async for step in stream:
                reply.take(step)
            return web.json_response(reply.whole())
        except BaselineError as error:
            raise ApiError(500, "baseline_failed", str(error)) from error
        finally:
            stream.is_abandoned = True


async def _stream(request: web.Request, reply: Reply, stream: StepStream, *, wants_usage: bool) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        async for step in stream:
            await _send(response, reply.take(step))
    except BaselineError as error:  # the status is out: the error is an event
        await _send(response, ApiError(500, "baseline_failed", str(error)).envelope())
    else:
        if wants_usage:
            await _send(response, reply.usage_chunk())
        await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _send(response: web.StreamResponse, event: Mapping[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@web.middleware
async def _envelopes(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors in OpenAI's form, aiohttp's own (404 for a path, 413) as well."""
    try:
        return await handler(request)
    except ApiError as error:
        return web.json_response(error.envelope(), status=error.status)
    except web.HTTPException as error:
        own = ApiError(error.status, f"http_{error.status}", f"{request.method} {request.path}: {error.reason}")
        return web.json_response(own.envelope(), status=error.status)
