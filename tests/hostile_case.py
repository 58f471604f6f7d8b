"""What a hostile upload is, and how the corpus makes them: the honest upload with one thing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from adapter_samples import Q, config_bytes, lora_config, lora_tensors, tensor_name
from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.canonical import Floats
from heddle_adapters.tensor_file import WEIGHTS_FILE


class Upload(NamedTuple):
    config: bytes
    weights: bytes


class Case(NamedTuple):
    """An upload that must be refused."""

    param: str  # the part that the refusal must point to
    reason: str  # words of the message, so that nothing is refused for a reason that is not the case's own
    make: Callable[[], Upload]


Cases = dict[str, Case]
Header = dict[str, Any]
Bytes = bytes | Callable[[], bytes]  # large ones are made when they are needed
A, B, BIAS, L = "lora_A.weight", "lora_B.weight", "lora_B.bias", "ia3_l"
FIRST = tensor_name(Q, A)  # [2, 8] in F32: 64 bytes, which the library puts at offset 0


def file_bytes(header: Header | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@cache
def honest() -> Upload:
    """The upload that all others are changes of."""
    return Upload(config_bytes(lora_config()), save(lora_tensors()))


def honest_header() -> Header:
    weights = honest().weights
    header: Header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    return header


def honest_data() -> bytes:
    weights = honest().weights
    return weights[8 + int.from_bytes(weights[:8], "little") :]


def bad_weights(reason: str, weights: Bytes) -> Case:
    return Case(WEIGHTS_FILE, reason, lambda: Upload(honest().config, weights() if callable(weights) else weights))


def bad_header(reason: str, header: Header | Bytes, data: bytes | None = None) -> Case:
    def make() -> bytes:
        text = header() if callable(header) else header
        return file_bytes(text, honest_data() if data is None else data)

    return bad_weights(reason, make)


def bad_entry(reason: str, entry: Any) -> Case:
    """The honest file with another header entry for its first tensor."""
    return bad_header(reason, {**honest_header(), FIRST: entry})


def bad_field(reason: str, **fields: Any) -> Case:
    return bad_entry(reason, {**honest_header()[FIRST], **fields})


def bad_tensors(reason: str, change: Callable[[dict[str, Floats]], object], **config: Any) -> Case:
    """The honest tensors after `change`, under a config with other fields."""

    def make() -> Upload:
        tensors = lora_tensors()
        change(tensors)
        return Upload(config_bytes(lora_config(**config)), save(tensors))

    return Case(WEIGHTS_FILE, reason, make)


def extra(reason: str, *names: str) -> Case:
    """The honest tensors and some more, each of the shape of an A."""
    return bad_tensors(reason, lambda tensors: tensors.update({name: ones(2, 8) for name in names}))


def bad_config_text(reason: str, config: Bytes) -> Case:
    return Case(CONFIG_FILE, reason, lambda: Upload(config() if callable(config) else config, honest().weights))


def bad_config(reason: str, **fields: Any) -> Case:
    return Case(CONFIG_FILE, reason, lambda: Upload(config_bytes(lora_config(**fields)), honest().weights))


def bad_rank(reason: str, **fields: Any) -> Case:
    """A config that is sound in itself and does not go with the weights."""
    return bad_config(reason, **fields)._replace(param=WEIGHTS_FILE)


def ones(*shape: int) -> Floats:
    return np.ones(shape, np.float32)


def shown(value: object, limit: int = 40) -> str:
    """A value as part of a case's name."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}... of {len(text)}"
