"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from heddle_server.api.answer_source import first_headers
from heddle_server.api.generation import Answer
from heddle_server.api.principal import principal_of
from heddle_server.api.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from heddle_server.api.replies import ChatReply, CompletionReply, Reply
from heddle_server.api.service import service_of
from heddle_server.api.streaming import EventStream, whole_reply

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Answers a conversation, with the adapter that `adapter` (or `model`) names."""
    answer = await service_of(request).admission.admit_chat(body, principal_of(request).tenant)
    return await _reply(body, answer, ChatReply, request)


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Goes on from a prompt, or several, with the adapter that `adapter` (or `model`) names."""
    answer = await service_of(request).admission.admit_completion(body, principal_of(request).tenant)
    return await _reply(body, answer, CompletionReply, request)


async def _reply(body: GenerationRequest, answer: Answer, reply_type: type[Reply], request: Request) -> Response:
    service, options = service_of(request), body.stream_options
    reply = reply_type(
        answer,
        body.model or answer.adapter_name or service.model_name,
        service.fingerprint,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )
    headers = first_headers(body, answer)
    if body.stream:
        return EventStream(answer, reply, headers)
    return await whole_reply(answer, reply, request.receive, headers)
