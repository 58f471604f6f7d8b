"""heddle's own part of a reply: exactly which weights gave an answer, and what it waited for."""

from __future__ import annotations

from typing import Any

from heddle_server.api.adapter_choice import AdapterChoice, ChosenAdapter
from heddle_server.api.generation import Answer
from heddle_server.api.protocol import GenerationRequest

Json = dict[str, Any]


def source_of(answer: Answer) -> Json:
    """The object `heddle` of a reply."""
    return {**_weights(answer.adapters), **_start(answer)}


def first_headers(body: GenerationRequest, answer: Answer) -> dict[str, str]:
    """What is known before the first byte: which adapters answer."""
    headers = {}
    if answer.adapters.adapters:
        headers["x-heddle-adapter"] = ", ".join(each.told_reference for each in answer.adapters)
    if body.adapter_id is not None:
        headers["warning"] = '299 heddle "adapter_id is read as adapter; send adapter"'
    return headers


def final_headers(answer: Answer) -> dict[str, str]:
    """What is known besides once a reply is whole."""
    if not answer.adapters.adapters:
        return {}
    return {"x-heddle-adapter-load-ms": str(_start(answer)["load_ms"])}


def _weights(adapters: AdapterChoice) -> Json:
    """An adapter as it was trained by its reference; one that is scaled or cut, or a mix, by its parts."""
    if single := adapters.single:
        version = single.version
        return {"adapter": single.reference, "version": version.version, "digest": version.digest}
    weights: Json = {"adapter": None, "version": None, "digest": adapters.key or None}
    if adapters.adapters:
        weights["adapters"] = [_part(each) for each in adapters]
    return weights


def _part(adapter: ChosenAdapter) -> Json:
    version = adapter.version
    part = {
        "name": adapter.reference,
        "version": version.version,
        "digest": version.digest,
        "scale": adapter.scale,
    }
    return part if adapter.rank is None else {**part, "rank": adapter.rank}


def _start(answer: Answer) -> Json:
    """How the first answer began: what it waited for, the others found."""
    first = answer.generations[0]
    admission = first.admission
    return {
        "cache": admission.tier if admission else None,
        "load_ms": _milliseconds(admission.load_seconds if admission else None),
        "queue_ms": _milliseconds(admission.queue_seconds if admission else None),
        "ttft_ms": _milliseconds(first.ttft_seconds),
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)
