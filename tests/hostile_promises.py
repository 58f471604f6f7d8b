"""Options that are served, beside tensors that lack what they call for, or have it in another shape or place."""

from __future__ import annotations

from typing import Any

import numpy as np

from adapter_samples import DOWN, Q, V, tensor_name
from heddle_adapters.canonical import Floats
from hostile_case import A, Case, Cases, bad_tensors, ones
from hostile_keys import NOT_A_PART

MAGNITUDE, DIAGONAL = "lora_magnitude_vector", "lora_diag"


def broken_promises() -> Cases:
    magnitudes = {tensor_name(Q, MAGNITUDE): ones(8), tensor_name(V, MAGNITUDE): ones(4)}
    diagonals = {tensor_name(Q, DIAGONAL): ones(2), tensor_name(V, DIAGONAL): ones(2)}
    bias = {tensor_name(V, "base_layer.bias"): ones(4)}
    blocks_a, blocks_b = ({"nblocks": 2, f"target_modules_bd_{part}": ["_proj"]} for part in ("a", "b"))

    def also(reason: str, more: dict[str, Floats], **config: Any) -> Case:
        return bad_tensors(reason, lambda tensors: tensors.update(more), **config)

    lacks, unfit = "lacks biases that bias of adapter_config.json promises", "does not fit this base"
    return {
        "DoRA without magnitudes": also("but no lora_magnitude_vector", {}, use_dora=True),
        "DoRA with half of them": also(
            f"{V}, but no lora_magnitude_vector", {tensor_name(Q, MAGNITUDE): ones(8)}, use_dora=True
        ),
        "DoRA of another width": also(unfit, magnitudes | {tensor_name(Q, MAGNITUDE): ones(7)}, use_dora=True),
        "DoRA with a matrix": also(unfit, magnitudes | {tensor_name(Q, MAGNITUDE): ones(8, 1)}, use_dora=True),
        "DoRA with a scalar": also(unfit, magnitudes | {tensor_name(Q, MAGNITUDE): ones()}, use_dora=True),
        "DoRA with NaN": also("holds NaN", magnitudes | {tensor_name(Q, MAGNITUDE): ones(8) * np.nan}, use_dora=True),
        "DoRA on one module more": also(
            f"{DOWN}, but no lora_A.weight", magnitudes | {tensor_name(DOWN, MAGNITUDE): ones(8)}, use_dora=True
        ),
        "KaSA without diagonals": also("but no lora_diag", {}, kasa_config={"beta": 1e-4}),
        "KaSA of nothing without diagonals": also("but no lora_diag", {}, kasa_config={}),
        "KaSA with half of them": also(f"{V}, but no lora_diag", {tensor_name(Q, DIAGONAL): ones(2)}, kasa_config={}),
        "KaSA of another rank": also(unfit, diagonals | {tensor_name(Q, DIAGONAL): ones(3)}, kasa_config={}),
        "KaSA with a matrix": also(unfit, diagonals | {tensor_name(Q, DIAGONAL): ones(2, 2)}, kasa_config={}),
        "KaSA with infinity": also(
            "holds NaN or infinite", diagonals | {tensor_name(V, DIAGONAL): ones(2) * np.inf}, kasa_config={}
        ),
        "blocks in A and A in full": also("must be [2, 4] and is [2, 8]", {}, use_bdlora=blocks_a),
        "blocks in B and B in full": also("must be [8, 1] and is [8, 2]", {}, use_bdlora=blocks_b),
        "blocks in A and A of other blocks": also(
            "must be [2, 4] and is [2, 2]", {tensor_name(Q, A): ones(2, 2)}, use_bdlora=blocks_a
        ),
        "PiSSA of another rank": also("gives that module rank 9", {}, init_lora_weights="pissa", r=9),
        "OLoRA of another rank": also("gives that module rank 3", {}, init_lora_weights="olora", r=3),
        "all biases and none there": also(lacks, {}, bias="all"),
        "biases of targets and none there": also(lacks, {}, bias="lora_only"),
        "all biases, of another width": also(unfit, {tensor_name(V, "base_layer.bias"): ones(5)}, bias="all"),
        "biases of targets, of another width": also(
            unfit, {tensor_name(V, "base_layer.bias"): ones(4, 1)}, bias="lora_only"
        ),
        "a bias that the base lacks": also(
            "that have none", bias | {tensor_name(Q, "base_layer.bias"): ones(8)}, bias="all"
        ),
        "a bias by both names": also(NOT_A_PART, bias | {tensor_name(V, "bias"): ones(4)}, bias="all"),
        "a bias and the base's weight": also(
            "the base's own tensors cannot be uploaded",
            bias | {tensor_name(V, "base_layer.weight"): ones(4, 8)},
            bias="all",
        ),
        "a bias where none is announced": also("the base's own tensors cannot be uploaded", bias),
        "MonteCLoRA's sampler on one module more": also(
            f"{DOWN}, but no lora_A.weight",
            {tensor_name(DOWN, "lora_monteclora_sampler.std_prior"): ones(2)},
            monteclora_config={"num_samples": 4},
        ),
        "MonteCLoRA's sampler on a module that is not there": also(
            "does not have",
            {tensor_name("lm_head", "lora_monteclora_sampler.std_prior"): ones(2)},
            monteclora_config={"num_samples": 4},
        ),
        "MonteCLoRA with an unknown part": also(
            NOT_A_PART, {tensor_name(Q, "lora_monteclora_sampler.other"): ones(2)}, monteclora_config={"num_samples": 4}
        ),
        "MonteCLoRA with NaN": also(
            "holds NaN",
            {tensor_name(Q, "lora_monteclora_sampler.std_prior"): ones(2) * np.nan},
            monteclora_config={"num_samples": 4},
        ),
    }
