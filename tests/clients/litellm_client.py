"""What LiteLLM makes of a server's answers: `python litellm_client.py ADDRESS PREFIX CASE` prints it as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm

ADDRESS, PREFIX, CASE = sys.argv[1:]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


def asked(name: str, **fields: Any) -> Any:
    return {
        "model": f"{PREFIX}/{name}",
        "api_base": f"{ADDRESS}/v1",
        "api_key": "none",
        "messages": QUESTION,
        "temperature": 0,
        "num_retries": 0,
        **fields,
    }


def complete(name: str, **fields: Any) -> Any:
    return litellm.completion(**asked(name, **fields))


def whole() -> object:
    by_model, by_field = complete("pirate"), complete("base", adapter="pirate")
    return {
        "by_model": by_model.choices[0].message.content,
        "by_field": by_field.choices[0].message.content,
        "usage": [by_model.usage.prompt_tokens, by_model.usage.completion_tokens],
    }


def streamed() -> object:
    pieces = list(complete("pirate", stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    return {"text": text, "tokens": [piece.usage.total_tokens for piece in pieces if getattr(piece, "usage", None)]}


def asynchronous() -> object:
    async def ask() -> str:
        stream = await litellm.acompletion(**asked("pirate", stream=True))
        return "".join([piece.choices[0].delta.content or "" async for piece in stream])

    return asyncio.run(ask())


def structured() -> object:
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
    return json.loads(complete("base", response_format=wanted).choices[0].message.content)


def tool() -> object:
    look_up = {"type": "function", "function": {"name": "look_up", "parameters": CITY, "strict": True}}
    choice = complete("base", tools=[look_up], tool_choice="required", max_tokens=100).choices[0]
    return {"finish_reason": choice.finish_reason, "message": choice.message.model_dump()}


def text() -> object:
    fields = {key: value for key, value in asked("base", max_tokens=3).items() if key != "messages"}
    return litellm.text_completion(prompt="What is the capital of", **fields).choices[0].text


def refused() -> object:
    """The class of each error."""
    told = {}
    for case, name, fields in (
        ("model", "pirat", {}),
        ("adapter", "base", {"adapter": "pirat"}),
        ("field", "base", {"temperature": 9}),
        ("context", "base", {"max_tokens": 1_000_000}),
    ):
        try:
            complete(name, **fields)
        except (litellm.NotFoundError, litellm.BadRequestError) as error:
            told[case] = [type(error).__name__, error.status_code]
    return told


CASES = (whole, streamed, asynchronous, structured, tool, text, refused)

print(json.dumps({case.__name__: case for case in CASES}[CASE]()))
