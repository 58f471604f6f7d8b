"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from heddle_server.api.generation import Generation
from heddle_server.api.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from heddle_server.api.replies import ChatReply, CompletionReply, Reply
from heddle_server.api.service import service_of
from heddle_server.api.streaming import EventStream, whole_reply

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Answers a conversation, with the adapter that `adapter` (or `model`) names."""
    generation = await service_of(request).admission.admit_chat(body)
    return await _answer(body, generation, ChatReply, request)


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Goes on from a prompt, with the adapter that `adapter` (or `model`) names."""
    generation = await service_of(request).admission.admit_completion(body)
    return await _answer(body, generation, CompletionReply, request)


async def _answer(
    body: GenerationRequest, generation: Generation, reply_type: type[Reply], request: Request
) -> Response:
    options = body.stream_options
    reply = reply_type(
        generation,
        body.model or generation.adapter_name or service_of(request).admission.model_name,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )
    if body.stream:
        return EventStream(generation, reply)
    return await whole_reply(generation, reply, request.receive)
