"""Fits a spec to the target it names: finds its base model, checks its adapters. Sends no chat request."""

import dataclasses
import difflib

from heddle_loadtest.client import ChatClient
from heddle_loadtest.errors import TargetError
from heddle_loadtest.spec import ALL_ADAPTERS, ClosedLoopSpec
from heddle_loadtest.style import BASE

_NUM_NAMES_SHOWN = 8


async def fit_to_target(spec: ClosedLoopSpec, client: ChatClient) -> ClosedLoopSpec:
    """`spec` with the base model's name filled in and `all` spelt out.

    Raises TargetError if the target is down, is no OpenAI server, or lacks the model or an adapter.
    """
    listed = await client.list_models()
    if not listed:
        raise TargetError("target", spec.target, "lists no models", "Let the server load a model first")
    model = listed[0] if spec.model is None else spec.model
    if model not in listed:
        raise _lacks("model", model, listed)
    if spec.adapters == ALL_ADAPTERS:
        adapters = (BASE, *(name for name in listed if name != model))
    else:
        adapters = tuple(BASE if name == model else name for name in spec.adapters)
    for name in adapters:
        if name not in (BASE, *listed):
            raise _lacks("adapters", name, (BASE, *(name for name in listed if name != model)))
    return dataclasses.replace(spec, model=model, adapters=adapters)


def _lacks(field: str, name: str, available: tuple[str, ...]) -> TargetError:
    nearest = difflib.get_close_matches(name, available, n=_NUM_NAMES_SHOWN) or available[:_NUM_NAMES_SHOWN]
    more = f" and {len(available) - len(nearest)} more" if len(available) > len(nearest) else ""
    return TargetError(field, name, "the target does not list it", f"It has: {', '.join(nearest)}{more}")
