"""PEFT's mixed batches as an arm of the serving benchmark: transformers' model in the same NF4, `generate`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from heddle_demo.bench.failure import BenchFailed
from heddle_demo.bench.generation import Generation, Prompts
from heddle_demo.bench.mixes import Mix
from heddle_demo.bench.random_adapters import RandomAdapters, write_peft_folder

BASE_NAME = "__base__"  # PEFT's name for a row of the batch that uses no adapter


class PeftArm:
    """One PeftModel with all adapters loaded."""

    name = "peft"

    def __init__(self, model: Any, names: list[str]) -> None:
        """`names` of the adapters by number."""
        self._model = model
        self._names = names

    @property
    def adapter_dtype(self) -> str:
        """What the adapters' weights are kept in."""
        return str(next(self._adapter_weights()).dtype).removeprefix("torch.")

    def choose_adapter_dtype(self, prompts: Prompts, mix: Mix, num_new_tokens: int) -> None:
        """Keep the adapters in the base's dtype or, as PEFT does by itself, in float32: in what is faster here."""
        dtypes = (self._model.dtype, torch.float32)
        seconds = dict.fromkeys(dtypes, math.inf)
        for dtype in dtypes * 2:
            self._keep_adapters_in(dtype)
            seconds[dtype] = min(seconds[dtype], self.generate(prompts, mix, num_new_tokens).seconds)
        self._keep_adapters_in(min(dtypes, key=lambda dtype: seconds[dtype]))

    @torch.inference_mode()
    def generate(self, prompts: Prompts, mix: Mix, num_new_tokens: int) -> Generation:
        started = time.perf_counter()
        token_ids = torch.tensor(prompts, device=self._model.device)  # [batch, num_prompt_tokens]
        with self._using(mix) as names:
            output = self._model.generate(
                input_ids=token_ids,
                attention_mask=torch.ones_like(token_ids),
                max_new_tokens=num_new_tokens,
                min_new_tokens=num_new_tokens,
                do_sample=False,
                use_cache=True,
                **names,
            )
        new_tokens = output[:, token_ids.shape[1] :].tolist()
        return Generation(new_tokens, time.perf_counter() - started)

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], new_tokens: list[int], adapter: int | None) -> Tensor:
        """[num_new_tokens, vocabulary] after the prompt and those of the new tokens that come before."""
        token_ids = torch.tensor([prompt + new_tokens[:-1]], device=self._model.device)
        with self._using([adapter]) as names:
            logits = self._model(input_ids=token_ids, use_cache=False, **names).logits[0, len(prompt) - 1 :]
        return torch.log_softmax(logits.float(), dim=-1).cpu()

    def _keep_adapters_in(self, dtype: torch.dtype) -> None:
        for weight in self._adapter_weights():
            weight.data = weight.data.to(dtype)

    def _adapter_weights(self) -> Iterator[Tensor]:
        return (weight for name, weight in self._model.named_parameters() if ".lora_" in name)

    @contextmanager
    def _using(self, mix: Mix) -> Iterator[dict[str, list[str]]]:
        """The arguments that choose adapters. A batch of the base alone is fastest with adapters switched off."""
        if any(who is not None for who in mix):
            yield {"adapter_names": [BASE_NAME if who is None else self._names[who] for who in mix]}
        else:
            with self._model.disable_adapter():
                yield {}


def require_peft() -> None:
    """Raises BenchFailed where PEFT is not installed."""
    if find_spec("peft") is None:
        raise BenchFailed('peft is not installed, so there is nothing to compare with: pip install "heddle[dev]".')


def start_peft(
    base: Path, folder: Path, device: torch.device, dtype: torch.dtype, adapters: RandomAdapters, num_adapters: int
) -> PeftArm:
    """Loads base and adapters; `folder` is for what PEFT reads the adapters from."""
    from peft import PeftModel

    disable_progress_bar()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, local_files_only=True, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    names = adapters.names(num_adapters)
    for number, name in enumerate(names):
        write_peft_folder(folder / name, adapters, number)
    options = {"torch_device": str(device)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads properties that transformers deprecates
        peft_model = PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0], **options)
        for name in names[1:]:
            peft_model.load_adapter(folder / name, adapter_name=name, **options)
    return PeftArm(peft_model.eval(), names)
