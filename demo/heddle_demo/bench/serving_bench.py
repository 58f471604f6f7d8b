"""`heddle bench serving`: whole answers by heddle's engine, in turn with PEFT's mixed batches over the same base.

Both run in this process, over the same random weights in NF4 and the same adapters, with as many threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heddle_demo.bench.agreement import Agreement, adapter_effect
from heddle_demo.bench.device import choose_device, device_name
from heddle_demo.bench.floor import BaseBytes
from heddle_demo.bench.generation import Arm
from heddle_demo.bench.heddle_arm import HeddleArm, HeddleSettings, start_heddle
from heddle_demo.bench.machine import check_room, describe_machine
from heddle_demo.bench.mixes import MIXES
from heddle_demo.bench.peft_arm import PeftArm, require_peft, start_peft
from heddle_demo.bench.random_adapters import RandomAdapters
from heddle_demo.bench.random_base import write_random_base
from heddle_demo.bench.serving_plan import ServingPlan
from heddle_demo.bench.serving_report import print_serving
from heddle_demo.bench.serving_results import ServingResults, Turn
from heddle_demo.bench.shape_layout import layout_of
from heddle_demo.bench.shapes import SHAPES

WEIGHT_LIMIT = 0.05  # of adapters: an effect of many times the rounding of bfloat16
AGREEMENT_TOKENS = 16
WARM_UP_TOKENS = 4
DISK_BYTES = 2.5  # for a byte of bfloat16 weights: the base, and the adapters twice

Say = Callable[[str], None]


def run_serving_bench(plan: ServingPlan, say: Say) -> dict[str, Any]:
    """Measures and prints a table; everything for scripts is returned.

    `say` is told what is going on.

    Raises BenchFailed or TooLittleRoom.
    """
    with tempfile.TemporaryDirectory(prefix="heddle-bench-") as folder:
        results = measure_serving(plan, Path(folder), say)
    print_serving(results)
    return results.to_json()


def measure_serving(plan: ServingPlan, folder: Path, say: Say) -> ServingResults:
    """One whole run, with `folder` for the base, the adapters and heddle's store."""
    device = choose_device(plan.device)
    if plan.has_peft:
        require_peft()
    shape = SHAPES[plan.shape]
    adapters = RandomAdapters(layout_of(shape), ranks=(plan.rank,), weight_limit=WEIGHT_LIMIT)
    base = folder / shape.name
    if plan.has_peft:
        check_room(folder, int(DISK_BYTES * 2 * shape.num_weights), 0)
        say(f"writing {shape.num_weights / 1e6:,.1f} million random weights")
        write_random_base(shape, base, device)
    else:
        shape.write_config(base)
    base_bytes = BaseBytes.of(base, adapters.base)
    say("starting heddle's engine")
    settings = HeddleSettings(
        base=base,
        store=folder / "store",
        device=plan.device,
        batch=plan.batch,
        num_tokens=plan.num_tokens,
        num_adapters=plan.num_adapters,
        num_threads=plan.num_threads,
        kernels=plan.kernels,
        load_format="auto" if plan.has_peft else "dummy",
    )
    with closing(start_heddle(settings, adapters, base_bytes.kv_per_token)) as ours:
        num_threads = torch.get_num_threads()  # the engine has chosen
        results = ServingResults(
            plan=plan,
            machine=describe_machine(),
            device=device_name(device),
            num_threads=num_threads,
            base_bytes=base_bytes,
            row_bytes=adapters.row_bytes(0),
            turns=(),
        )
        if not plan.has_peft:
            return replace(results, turns=tuple(take_turns(plan, [ours], say)))
        say("loading the base and the adapters with PEFT")
        theirs = start_peft(base, folder / "peft", device, torch.bfloat16, adapters, plan.num_adapters)
        torch.set_num_threads(num_threads)
        theirs.choose_adapter_dtype(
            _prompts(plan, seed=-1), MIXES["distinct"](plan.batch, plan.num_adapters), WARM_UP_TOKENS
        )
        agreements, effect = _compare(plan, ours, theirs)
        return replace(
            results,
            turns=tuple(take_turns(plan, [ours, theirs], say)),
            peft={"adapter_dtype": theirs.adapter_dtype, "base": "adapters disabled", "others": "adapter_names"},
            agreements=agreements,
            adapter_effect=effect,
        )


def take_turns(plan: ServingPlan, arms: list[Arm], say: Say) -> Iterator[Turn]:
    """Every mix by every arm, round after round, every other round backwards: what drifts hits all alike.

    All arms get the same prompts, and no prompt comes twice. A first, shorter round is not counted.
    """
    for number in range(-1, plan.num_rounds):
        num_new_tokens = min(WARM_UP_TOKENS, plan.num_new_tokens) if number < 0 else plan.num_new_tokens
        say("warming up" if number < 0 else f"measuring round {number + 1} of {plan.num_rounds}")
        for mix_number, mix in enumerate(plan.mixes):
            prompts = _prompts(plan, seed=(number + 1) * len(plan.mixes) + mix_number)
            for arm in arms if number % 2 == 0 else reversed(arms):
                generation = arm.generate(prompts, MIXES[mix](plan.batch, plan.num_adapters), num_new_tokens)
                assert all(len(tokens) == num_new_tokens for tokens in generation.token_ids)
                if number >= 0:
                    yield Turn(arm.name, mix, number, generation)


def _compare(plan: ServingPlan, ours: HeddleArm, theirs: PeftArm) -> tuple[tuple[Agreement, ...], float]:
    """The base and one adapter by both arms on the tokens that heddle answered; the least effect of an adapter."""
    prompt = _prompts(plan, seed=-2)[0]
    agreements = []
    for adapter in (None, 0):
        new_tokens, logprobs = ours.answer(prompt, adapter, AGREEMENT_TOKENS)
        agreements.append(Agreement.of(adapter, logprobs, theirs.logprobs(prompt, new_tokens, adapter)))
    of_base = theirs.logprobs(prompt, new_tokens, None)
    of_adapters = [theirs.logprobs(prompt, new_tokens, adapter) for adapter in range(plan.num_adapters)]
    return tuple(agreements), adapter_effect(of_base, of_adapters)


def _prompts(plan: ServingPlan, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed % 2**32)
    tokens = random.integers(3, SHAPES[plan.shape].vocabulary_size, size=(plan.batch, plan.num_prompt_tokens))
    return [[int(token) for token in row] for row in tokens]
