"""What a batch of many methods costs, beside a batch of LoRAs with as many rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from heddle_demo.parity.peft_sample import PeftSample
from heddle_demo.parity.peft_samples import DENSE, LINEARS, TASK
from heddle_demo.parity.sample import Sample
from heddle_demo.parity.samples import SAMPLES
from heddle_demo.parity.served import Served

# Qwen2.5-0.5B's widths in four layers: as much work a layer as a real base, a sixth of its size; and more key heads,
# so that its pages are no smaller than those.
SIZES: Mapping[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 14,
    "max_position_embeddings": 512,
}
SETTINGS: Mapping[str, Any] = {"dtype": "bfloat16", "pool_bytes": 1 << 30}
NUM_ROUNDS = 7
NUM_STEPS = 24
MIN_PAGES = 20  # of an adapter for which one last page is no more than the 5 % that are looked for
PROMPT = list(range(3, 35))


@dataclass(frozen=True)
class Cost:
    """What was measured of a batch with one request for each sample."""

    ratio: float  # seconds of a decode step, over those of as many LoRAs with as many rows: median over rounds
    ratios: list[float]  # of each round
    num_requests: int
    num_rows: int
    memory: dict[str, float]  # by sample: pages over the bytes of its rows and vectors, from MIN_PAGES pages on


COSTED = tuple(sample for sample in SAMPLES if sample not in DENSE and not sample.on_plain_base_only)


def cost_of_methods(samples: Sequence[Sample], folder: Path) -> Cost:
    """Both batches in turn, in one process."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    base.save_pretrained(folder / "model")
    served = Served(folder / "model", folder / "store", SIZES["vocab_size"], **SETTINGS)
    mixed = _register(served, base, samples, folder / "mixed")
    num_rows = sum(served.checkpoints[name].num_rows for name in mixed)
    loras = _register(served, base, _loras(len(samples), num_rows), folder / "loras")
    ratios = []
    for number in range(NUM_ROUNDS + 1):
        seconds = [served.seconds_of_steps([(name, PROMPT) for name in arm], NUM_STEPS) for arm in (mixed, loras)]
        if number:  # the first round also loads and compiles
            ratios.append(seconds[0] / seconds[1])
    least = MIN_PAGES * served.engine.model.page_bytes
    memory = {
        name: size / served.checkpoints[name].estimate_bytes(2)
        for name, size in served.page_bytes().items()
        if size >= least
    }
    served.close()
    return Cost(statistics.median(ratios), ratios, len(mixed), num_rows, memory)


def _loras(count: int, num_rows: int) -> list[Sample]:
    """So many LoRAs on all linears, whose rows together are as near to `num_rows` as whole ranks allow."""
    num_sites = len(LINEARS) * SIZES["num_hidden_layers"]
    total_rank = round(num_rows / num_sites)
    ranks = [total_rank // count + (number < total_rank % count) for number in range(count)]
    return [PeftSample(f"lora {number}", partial(_lora, rank)) for number, rank in enumerate(ranks)]


def _lora(rank: int, base: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, task_type=TASK)


def _register(served: Served, base: Any, samples: Sequence[Sample], folder: Path) -> list[str]:
    folders = {}
    for number, sample in enumerate(samples):
        folders[sample.name] = folder / str(number)
        folders[sample.name].mkdir(parents=True)
        sample.save(base, folders[sample.name], seed=number)
    refusals = served.register(folders)
    assert not refusals, refusals
    return list(folders)
