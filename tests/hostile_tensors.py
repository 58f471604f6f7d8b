"""Weights files whose tensors have the right names and cannot be served: values, missing halves, shapes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from safetensors.numpy import save

from adapter_samples import DOWN, RANK, Q, V, config_bytes, tensor_name
from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.canonical import Floats
from heddle_adapters.tensor_file import WEIGHTS_FILE
from hostile_case import (
    BIAS,
    A,
    B,
    Case,
    Cases,
    L,
    Upload,
    bad_tensors,
    bad_weights,
    file_bytes,
    honest,
    honest_header,
    ones,
)

NOT_FINITE: dict[str, dict[str, int]] = {
    "F32": {
        "NaN": 0x7FC0_0000,
        "signalling NaN": 0x7F80_0001,
        "negative NaN": 0xFFC0_0000,
        "NaN of all ones": 0xFFFF_FFFF,
        "infinity": 0x7F80_0000,
        "negative infinity": 0xFF80_0000,
    },
    "F16": {
        "NaN": 0x7E00,
        "signalling NaN": 0x7C01,
        "negative NaN": 0xFE00,
        "NaN of all ones": 0xFFFF,
        "infinity": 0x7C00,
        "negative infinity": 0xFC00,
    },
    "BF16": {
        "NaN": 0x7FC0,
        "signalling NaN": 0x7F81,
        "negative NaN": 0xFFC0,
        "NaN of all ones": 0xFFFF,
        "infinity": 0x7F80,
        "negative infinity": 0xFF80,
    },
}


def non_finite_values() -> Cases:
    return {
        f"{kind} {dtype} as the {place} of {part}": bad_weights(
            "holds NaN or infinite", partial(_poisoned, dtype, bits, tensor_name(site, part), index)
        )
        for dtype, kinds in NOT_FINITE.items()
        for kind, bits in kinds.items()
        for place, site, part, index in (("first", Q, A, 0), ("last", V, B, -1))
    }


def _poisoned(dtype: str, bits: int, name: str, index: int) -> bytes:
    """The honest names and shapes, all zeros in `dtype` but one number of one tensor."""
    code = {"F32": "<I", "F16": "<H", "BF16": "<H"}[dtype]
    size = struct.calcsize(code)
    header, data = honest_header(), b""
    for key, entry in header.items():
        rows, columns = entry["shape"]
        numbers = [0] * (rows * columns)
        if key == name:
            numbers[index] = bits
        begin = len(data)
        data += b"".join(struct.pack(code, number) for number in numbers)
        entry.update(dtype=dtype, data_offsets=[begin, begin + size * len(numbers)])
    return file_bytes(header, data)


def halves() -> Cases:
    """Files of which something is missing."""

    def without(reason: str, *names: str, **config: Any) -> Case:
        return bad_tensors(reason, lambda tensors: [tensors.pop(name) for name in names], **config)

    of = {(site, part): tensor_name(path, part) for site, path in (("Q", Q), ("V", V)) for part in (A, B)}
    alone = {
        f"{site} without {part}": without(f"but no {part}", of[site, part]) for site in ("Q", "V") for part in (A, B)
    }
    return alone | {
        "every A and no B": without(f"but no {B}", of["Q", B], of["V", B]),
        "every B and no A": without(f"but no {A}", of["Q", A], of["V", A]),
        "A of one and B of another": without(f"but no {B}", of["Q", B], of["V", A]),
        "nothing for V": without("target_modules of adapter_config.json promises", of["V", A], of["V", B]),
        "nothing for Q": without("target_modules of adapter_config.json promises", of["Q", A], of["Q", B]),
        "nothing for a third": without("promises: " + DOWN, target_modules=["q_proj", "v_proj", "down_proj"]),
        "nothing for a whole path": without("promises: " + DOWN, target_modules=["q_proj", DOWN]),
        "nothing for an ending": without("promises: " + DOWN, target_modules=["mlp.down_proj"]),
        "lora_bias without a bias": without(f"but no {BIAS}", lora_bias=True),
        "a bias for Q alone": bad_tensors(
            f"but no {BIAS}", lambda tensors: tensors.update({tensor_name(Q, BIAS): ones(8)}), lora_bias=True
        ),
        "a bias alone": bad_tensors(f"but no {A}", _only_a_bias, lora_bias=True),
    }


def _only_a_bias(tensors: dict[str, Floats]) -> None:
    tensors.clear()
    tensors[tensor_name(Q, BIAS)] = ones(8)


def misfitting_tensors() -> Cases:
    def put(reason: str, site: str, part: str, *shape: int, **config: Any) -> Case:
        return bad_tensors(reason, lambda tensors: tensors.update({tensor_name(site, part): ones(*shape)}), **config)

    transposed: dict[str, Callable[[dict[str, Floats]], object]] = {
        f"transposed {part} of {site.rpartition('.')[2]}": partial(_transpose, tensor_name(site, part))
        for site in (Q, V)
        for part in (A, B)
    }
    reasons = {A: "that module rank 2", B: "must be"}
    turned = {name: bad_tensors(reasons[name.split()[1]], change) for name, change in transposed.items()}
    wide = {
        f"{part} of {list(shape)}": put(f"must be {list(fitting)} and is {list(shape)}", Q, part, *shape)
        for part, fitting, shapes in (
            (A, (RANK, 8), [(2, 7), (2, 9), (2, 1), (2, 16), (2, 80), (2, 8, 1), (2, 1, 8), (2,), (2, 2, 2, 2)]),
            (B, (8, RANK), [(7, 2), (9, 2), (1, 2), (16, 2), (8, 1), (8, 3), (8, 2, 1), (1, 8, 2), (16,), (8,), ()]),
        )
        for shape in shapes
    }
    ranked = {
        f"A of {list(shape)}": put(f"has shape {list(shape)}", Q, A, *shape)
        for shape in ((), (1,), (8,), (16,), (1, 8), (3, 8), (8, 8), (1, 2, 8), (1, 16), (256, 8))
    }
    biases = {
        f"bias of {list(shape)}": bad_tensors(
            "must be [8] and is", partial(_biased, shape), lora_bias=True, target_modules=["q_proj"]
        )
        for shape in ((), (7,), (9,), (1, 8), (8, 1), (2,))
    }
    others = {
        "one module's tensors at another": put("must be [8, 2] and is [4, 2]", Q, B, 4, 2),
        "rank 2 and rank 3": put("must be [4, 2] and is [4, 3]", V, B, 4, 3),
        "both of a larger model": bad_tensors("must be [2, 8] and is [2, 4096]", _enlarged),
        "both of rank 1": bad_tensors("that module rank 2", partial(_resized, 1)),
        "both of rank 64": bad_tensors("that module rank 2", partial(_resized, 64)),
        "both of rank 3 for 4": bad_tensors("rank 4", partial(_resized, 3), rank_pattern={"q_proj": 4}, r=3),
        "down_proj with the widths of Q": bad_tensors("must be [2, 16] and is [2, 8]", _down_like_q),
    }  # fmt: skip
    return turned | wide | ranked | biases | others


def _transpose(name: str, tensors: dict[str, Floats]) -> None:
    tensors[name] = tensors[name].T.copy()


def _resized(rank: int, tensors: dict[str, Floats]) -> None:
    tensors[tensor_name(Q, A)], tensors[tensor_name(Q, B)] = ones(rank, 8), ones(8, rank)


def _enlarged(tensors: dict[str, Floats]) -> None:
    tensors[tensor_name(Q, A)], tensors[tensor_name(Q, B)] = ones(2, 4096), ones(4096, 2)


def _down_like_q(tensors: dict[str, Floats]) -> None:
    tensors[tensor_name(DOWN, A)], tensors[tensor_name(DOWN, B)] = ones(2, 8), ones(8, 2)


def _biased(shape: tuple[int, ...], tensors: dict[str, Floats]) -> None:
    """Q alone, with a bias."""
    del tensors[tensor_name(V, A)], tensors[tensor_name(V, B)]
    tensors[tensor_name(Q, BIAS)] = ones(*shape)


def ia3_uploads() -> Cases:
    def ia3(reason: str, tensors: dict[str, Floats], *, param: str = WEIGHTS_FILE, **config: Any) -> Case:
        fields = {"peft_type": "IA3", "target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        content = config_bytes({**fields, **config})
        return Case(param, reason, lambda: Upload(content, save(tensors)))

    q, v, down = (tensor_name(site, L) for site in (Q, V, DOWN))
    sound = {q: ones(8, 1), down: ones(1, 16)}
    shapes = {
        f"Q of {list(shape)}": ia3(reason, {**sound, q: ones(*shape)})
        for shape, reason in {
            (1, 8): "scales the layer's output",
            (8,): "must be [8, 1]",
            (): "must be [8, 1]",
            (7, 1): "must be [8, 1]",
            (9, 1): "must be [8, 1]",
            (8, 8): "must be [8, 1]",
            (8, 1, 1): "must be [8, 1]",
        }.items()
    }
    inputs = {
        f"down of {list(shape)}": ia3(reason, {**sound, down: ones(*shape)})
        for shape, reason in {
            (8, 1): "scales the layer's input",
            (16, 1): "must be [1, 16]",
            (1, 8): "must be [1, 16]",
            (1, 15): "must be [1, 16]",
            (16,): "must be [1, 16]",
            (1, 16, 1): "must be [1, 16]",
        }.items()
    }
    declared: dict[str, Any] = {
        "a regular expression": "(a+)+$",
        "a number": 7,
        "an object": {"down_proj": 1},
        "true": True,
        "numbers": [1, 2],
        "lists": [["down_proj"]],
        "a null": ["down_proj", None],
        "too many names": [f"m{number}" for number in range(16_385)],
    }
    modules = {
        f"feedforward_modules {kind}": ia3("feedforward_modules", sound, param=CONFIG_FILE, feedforward_modules=value)
        for kind, value in declared.items()
    }
    fields = {
        f"with {field}": ia3(f"{field}", sound, param=CONFIG_FILE, **{field: value})
        for field, value in {
            "r": 8,
            "lora_alpha": 16,
            "modules_to_save": ["lm_head"],
            "use_dora": True,
            "fan": 1,
        }.items()
    }
    others = {
        "swapped shapes": ia3("scales the layer's output", {q: ones(1, 8), down: ones(8, 1)}),
        "feedforward undeclared": ia3("scales the layer's output", sound, feedforward_modules=[]),
        "everything declared feedforward": ia3("scales the layer's input", sound, feedforward_modules=[""]),
        "a module missing": ia3("promises: " + DOWN, {q: ones(8, 1)}),
        "another module": ia3("does not have", {**sound, tensor_name("model.layers.9.mlp.down_proj", L): ones(1, 16)}),
        "another adapter": ia3("not part of a IA3", {**sound, tensor_name(Q, "ia3_l.victim"): ones(8, 1)}),
        "LoRA tensors": ia3("not part of a IA3", {**sound, tensor_name(V, A): ones(2, 8)}),
        "the base's weight": ia3("base's own tensors", {**sound, tensor_name(Q, "base_layer.weight"): ones(8, 8)}),
        "twice": ia3("keep one of them", {**sound, f"{Q}.{L}": ones(8, 1)}),
        "NaN": ia3("holds NaN", {**sound, q: ones(8, 1) * float("nan")}),
        "infinity": ia3("holds NaN", {**sound, down: ones(1, 16) * float("inf")}),
        "shape of V at Q": ia3("must be [8, 1]", {**sound, q: ones(4, 1), v: ones(4, 1)}),
        "a LoRA": bad_tensors("not part of a IA3", lambda tensors: None)._replace(
            make=lambda: Upload(config_bytes({"peft_type": "IA3"}), honest().weights)
        ),
    }
    return shapes | inputs | modules | fields | others
