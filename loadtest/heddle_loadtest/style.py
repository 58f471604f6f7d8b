"""How a request names its adapter. Knows the two body fields involved, nothing else of a request."""

from enum import StrEnum

BASE = "base"  # the adapter name that means: the base model, no adapter


class AdapterStyle(StrEnum):
    """The convention by which the target picks an adapter."""

    HEDDLE = "heddle"  # an `adapter` field beside `model`
    OPENAI = "openai"  # the adapter's name in the place of the model's, as vLLM and others do

    def request_fields(self, adapter: str, model: str | None) -> dict[str, str]:
        """The body fields that select `adapter`; `model` is the base model, or None to leave it to the server."""
        model_field = {} if model is None else {"model": model}
        if adapter == BASE:
            return model_field
        if self is AdapterStyle.OPENAI:
            return {"model": adapter}
        return model_field | {"adapter": adapter}
