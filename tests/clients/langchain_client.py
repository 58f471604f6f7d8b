"""What LangChain makes of a server's answers: `python langchain_client.py ADDRESS CASE` prints it as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

ADDRESS, CASE = sys.argv[1:]
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")

    city: str = Field(max_length=20)
    big: bool


def model(name: str = "base", **settings: Any) -> Any:
    return ChatOpenAI(
        base_url=f"{ADDRESS}/v1", api_key="none", model=name, temperature=0, max_retries=0, max_tokens=100, **settings
    )


def invoked() -> object:
    by_model = model("pirate").invoke(QUESTION)
    by_field = model(extra_body={"adapter": "pirate"}).invoke([("system", "Answer."), ("user", QUESTION)])
    return {"by_model": by_model.content, "by_field": by_field.content, "usage": by_model.usage_metadata}


def streamed() -> object:
    pieces = list(model("pirate", stream_usage=True).stream(QUESTION))
    usages = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    return {"pieces": [piece.content for piece in pieces], "usages": usages}


def structured() -> object:
    ways = ("json_schema", "function_calling")
    return [model().with_structured_output(City, method=way).invoke(QUESTION).model_dump() for way in ways]


def tools() -> object:
    """A call, and the conversation that goes on from it."""
    asking = model().bind_tools([City], tool_choice="City").invoke(QUESTION)
    (call,) = asking.tool_calls
    conversation = [HumanMessage(QUESTION), asking, ToolMessage("It is Paris.", tool_call_id=call["id"])]
    return {"call": call, "then": model().bind_tools([City]).invoke(conversation).response_metadata["finish_reason"]}


def streamed_tool() -> object:
    whole = AIMessageChunk("")
    for piece in model().bind_tools([City], tool_choice="required").stream(QUESTION):
        whole = whole + piece
    return whole.tool_calls


def batch() -> object:
    return [answer.content for answer in model().batch([QUESTION, "What is 2 plus 3?"])]


def completion() -> object:
    llm = OpenAI(base_url=f"{ADDRESS}/v1", api_key="none", model="base", temperature=0, max_tokens=5, max_retries=0)
    return [llm.invoke(QUESTION), "".join(llm.stream(QUESTION))]


def refused() -> object:
    try:
        model("pirat").invoke(QUESTION)
    except openai.NotFoundError as error:
        return {"code": error.code, "param": error.param}
    return None


CASES = {
    case.__name__: case for case in (invoked, streamed, structured, tools, streamed_tool, batch, completion, refused)
}

print(json.dumps(CASES[CASE]()))
