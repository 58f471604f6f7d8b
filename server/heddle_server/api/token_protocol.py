"""The wire types of /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from heddle_server.api.protocol import MAX_INTEGER, Message
from heddle_server.api.tools import FunctionTool
from heddle_server.api.wire_fields import Ignored, TemplateVariables, WireModel, invalid

OF_CHATS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")

_MODEL = Field(description="Accepted; the base and all of its adapters have the same tokens.")


class TokenizeRequest(WireModel):
    """POST /tokenize: a text, or a chat as its template writes it."""

    model_config = ConfigDict(
        **WireModel.model_config, json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    )

    model: Annotated[Ignored, _MODEL] = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: Annotated[
        bool | None, Field(description="Of a prompt; true unless said otherwise. A chat's template writes its own.")
    ] = None
    return_token_strs: Annotated[bool | None, Field(description="Each token's text as well.")] = None

    tools: list[FunctionTool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("send either a prompt or messages", "prompt")
        for field in OF_CHATS:
            if self.messages is None and getattr(self, field) is not None:
                raise invalid(f"{field} belongs to messages, and there is a prompt", field)
        if self.messages is not None and self.add_special_tokens:
            raise invalid("the chat template writes the special tokens of messages itself", "add_special_tokens")
        return self


class DetokenizeRequest(WireModel):
    """POST /detokenize"""

    model: Annotated[Ignored, _MODEL] = None
    tokens: list[Annotated[int, Field(ge=0, le=MAX_INTEGER)]]
