"""PEFT's mixed batches as an arm of the serving benchmark: the load generator's PEFT runner over random adapters."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from heddle_demo.bench.failure import BenchFailed
from heddle_demo.bench.generation import Generation, Prompts
from heddle_demo.bench.mixes import Mix
from heddle_demo.bench.random_adapters import RandomAdapters, write_peft_folder
from heddle_loadtest.baseline import peft_runner
from heddle_loadtest.baseline.peft_runner import PeftRunner, load_peft
from heddle_loadtest.baseline.request import GenerationRequest
from heddle_loadtest.errors import SpecError


class PeftArm:
    """A runner whose adapters have numbers."""

    name = "peft"

    def __init__(self, runner: PeftRunner) -> None:
        self._runner = runner

    @property
    def adapter_dtype(self) -> str:
        """What the adapters' weights are kept in."""
        return self._runner.adapter_dtype

    def choose_adapter_dtype(self, prompts: Prompts, mix: Mix, num_new_tokens: int) -> None:
        """Keep the adapters in what this batch is faster with."""
        self._runner.choose_adapter_dtype(lambda: self.generate(prompts, mix, num_new_tokens))

    def generate(self, prompts: Prompts, mix: Mix, num_new_tokens: int) -> Generation:
        started = time.perf_counter()
        requests = [
            GenerationRequest(prompt=prompt, adapter=self._named(who), max_tokens=num_new_tokens, ignore_eos=True)
            for prompt, who in zip(prompts, mix, strict=True)
        ]
        new_tokens = self._runner.generate_mixed(requests)
        return Generation(new_tokens, time.perf_counter() - started)

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], new_tokens: list[int], adapter: int | None) -> Tensor:
        """[num_new_tokens, vocabulary] after the prompt and those of the new tokens that come before."""
        model = self._runner.model
        token_ids = torch.tensor([prompt + new_tokens[:-1]], device=model.device)
        with self._runner.choosing([self._named(adapter)]) as names:
            logits = model(input_ids=token_ids, use_cache=False, **names).logits[0, len(prompt) - 1 :]
        return torch.log_softmax(logits.float(), dim=-1).cpu()

    def _named(self, adapter: int | None) -> str | None:
        return None if adapter is None else self._runner.adapters[adapter]


def require_peft() -> None:
    """Raises BenchFailed where PEFT is not installed."""
    try:
        peft_runner.require_peft()
    except SpecError as error:
        raise BenchFailed(f"{error.problem}, so there is nothing to compare with. {error.remedy}.") from error


def start_peft(
    base: Path, folder: Path, device: torch.device, dtype: torch.dtype, adapters: RandomAdapters, num_adapters: int
) -> PeftArm:
    """Loads base and adapters; `folder` is for what PEFT reads the adapters from."""
    folders = {name: folder / name for name in adapters.names(num_adapters)}
    for number, path in enumerate(folders.values()):
        write_peft_folder(path, adapters, number)
    return PeftArm(load_peft(base, folders, device=device, dtype=dtype))
