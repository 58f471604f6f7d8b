"""POST /tokenize and /detokenize: the base's own tokens of a text or a chat, and the text of tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from heddle_server.api.admission import check_vocabulary
from heddle_server.api.protocol import ChatCompletionRequest
from heddle_server.api.service import Service, service_of
from heddle_server.api.token_protocol import OF_CHATS, DetokenizeRequest, TokenizeRequest
from heddle_server.api.validation import checked

Json = dict[str, Any]

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """How many tokens a text or a chat has, and which: of a chat those that its completion is counted for."""
    return await asyncio.to_thread(_tokens, service_of(request), body)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens, special ones included."""
    return await asyncio.to_thread(_text, service_of(request), body)


def _tokens(service: Service, body: TokenizeRequest) -> Response:
    model = service.admission.require_engine()
    if body.prompt is not None:
        token_ids = service.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        token_ids = service.admission.chat_token_ids(_chat_of(body))
    content: Json = {"count": len(token_ids), "max_model_len": model.max_model_len, "tokens": token_ids}
    if body.return_token_strs:
        content["token_strs"] = [service.tokenizer.token_text(token_id) for token_id in token_ids]
    return _json(content)


def _text(service: Service, body: DetokenizeRequest) -> Response:
    check_vocabulary(body.tokens, service.admission.require_engine().vocabulary_size, "tokens")
    return _json({"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _chat_of(body: TokenizeRequest) -> ChatCompletionRequest:
    return checked(ChatCompletionRequest, {name: getattr(body, name) for name in OF_CHATS})


def _json(content: Json) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
