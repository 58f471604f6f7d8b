"""POST /v1/responses: OpenAI's newer way to ask, without what it keeps between requests."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from heddle_server.api.answer_source import first_headers
from heddle_server.api.principal import principal_of
from heddle_server.api.responses_chat import chat_of, named_as_sent
from heddle_server.api.responses_protocol import ResponsesRequest
from heddle_server.api.responses_reply import ResponsesReply
from heddle_server.api.service import service_of
from heddle_server.api.streaming import EventStream, whole_reply

router = APIRouter(tags=["generation"])


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answers a conversation of items, with the adapter that `adapter` (or `model`) names. Nothing of it is kept."""
    service = service_of(request)
    with named_as_sent():
        answer = await service.admission.admit_chat(chat_of(body), principal_of(request).tenant)
        reply = ResponsesReply(answer, body, body.model or answer.adapter_name or service.model_name)
        headers = first_headers(body, answer)
        if body.stream:
            return EventStream(answer, reply, headers)
        return await whole_reply(answer, reply, request.receive, headers)
