"""A base with PEFT adapters in this process: `generate` for a batch that mixes them, or for one at a time.

Serves `heddle-loadtest baseline` and `heddle bench serving` alike, so that both measure the same PEFT. Knows no HTTP,
no queue and no clock but the one it chooses the adapters' dtype by.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import disable_progress_bar

from heddle_loadtest.baseline.request import Answer, GenerationRequest, Step
from heddle_loadtest.baseline.settings import Quantization
from heddle_loadtest.errors import SpecError

BASE_NAME = "__base__"  # PEFT's name for a row of the batch that uses no adapter
PAD_TOKEN_ID = 0  # never seen by a model: the attention mask hides it

# Takes each request's next step, None where it was complete before; whether to go on at all.
OnStep = Callable[[Sequence[Step | None]], bool]


class PeftRunner:
    """One PeftModel with all adapters loaded. For one thread at a time."""

    def __init__(self, model: Any, peft_names: Mapping[str, str]) -> None:
        """`peft_names`: what PEFT calls each adapter."""
        self.model = model
        self.end_token_ids = _take_end_token_ids(model)
        self._peft_names = peft_names

    @property
    def base(self) -> Any:
        """transformers' model, its linears wrapped by PEFT."""
        return self.model.get_base_model()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Their names, in the order they were loaded in."""
        return tuple(self._peft_names)

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its answer, at most."""
        return int(self.base.config.get_text_config().max_position_embeddings)

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below it."""
        return int(self.base.config.get_text_config().vocab_size)

    @property
    def adapter_dtype(self) -> str:
        """What the adapters' weights are kept in."""
        return str(next(self._adapter_weights()).dtype).removeprefix("torch.")

    def choose_adapter_dtype(self, probe: Callable[[], object]) -> None:
        """Keep the adapters in the base's dtype or, as PEFT does by itself, in float32: where `probe` ends sooner."""
        dtypes = tuple(dict.fromkeys((self.model.dtype, torch.float32)))
        seconds = dict.fromkeys(dtypes, math.inf)
        for dtype in dtypes * 2:
            self._keep_adapters_in(dtype)
            started = time.perf_counter()
            probe()
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
        self._keep_adapters_in(min(dtypes, key=lambda dtype: seconds[dtype]))

    def generate_mixed(self, requests: Sequence[GenerationRequest], on_step: OnStep | None = None) -> list[list[int]]:
        """One `generate` for requests of any adapters; the new tokens of each.

        It goes on until the longest answer is complete, or `on_step` says no.
        """
        with self.choosing([request.adapter for request in requests]) as names:
            return self._generate(requests, on_step, names)

    def generate_grouped(self, requests: Sequence[GenerationRequest], on_step: OnStep | None = None) -> list[list[int]]:
        """As `generate_mixed`, for requests of one adapter, by PEFT's ordinary way without `adapter_names`."""
        (adapter,) = {request.adapter for request in requests}
        self.activate(adapter)
        return self._generate(requests, on_step, {})

    def activate(self, adapter: str | None) -> None:
        """Every forward pass without `adapter_names` uses it from now on."""
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self._peft_names[adapter])

    @contextmanager
    def choosing(self, adapters: Sequence[str | None]) -> Iterator[dict[str, list[str]]]:
        """The arguments that choose each row's adapter. The base alone is fastest with adapters switched off."""
        if any(name is not None for name in adapters):
            yield {"adapter_names": [BASE_NAME if name is None else self._peft_names[name] for name in adapters]}
        else:
            with self.model.disable_adapter():
                yield {}

    @torch.inference_mode()
    def _generate(
        self, requests: Sequence[GenerationRequest], on_step: OnStep | None, names: Mapping[str, list[str]]
    ) -> list[list[int]]:
        token_ids, attention_mask = self._pad_left([request.prompt for request in requests])
        watch = _StepWatch([Answer(request, self.end_token_ids) for request in requests], on_step)
        self.model.generate(
            input_ids=token_ids,
            attention_mask=attention_mask,
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=False,
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([watch]),
            **names,
        )
        return [answer.tokens for answer in watch.answers]

    def _pad_left(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both [batch, longest prompt]."""
        longest = max(map(len, prompts))
        token_ids = torch.tensor([[PAD_TOKEN_ID] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return token_ids.to(self.model.device), mask.to(self.model.device)

    def _keep_adapters_in(self, dtype: torch.dtype) -> None:
        for weight in self._adapter_weights():
            weight.data = weight.data.to(dtype)

    def _adapter_weights(self) -> Iterator[Tensor]:
        mark = f".{self.model.base_model.prefix}"
        return (weight for name, weight in self.model.named_parameters() if mark in name)


class _StepWatch(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed here
    """Sees the tokens of each step of `generate` as they are chosen, and says which requests are complete.

    transformers' streamers take tokens as well, but cannot say that a request with less to answer is complete.
    """

    def __init__(self, answers: list[Answer], on_step: OnStep | None) -> None:
        self.answers = answers
        self._on_step = on_step

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """input_ids: [batch, tokens so far]; which rows are done: [batch]."""
        steps = [answer.take(token) for answer, token in zip(self.answers, input_ids[:, -1].tolist(), strict=True)]
        goes_on = self._on_step is None or self._on_step(steps)
        return torch.tensor([answer.is_done or not goes_on for answer in self.answers], device=input_ids.device)


def require_peft() -> None:
    """Raises SpecError where PEFT is not installed."""
    if find_spec("peft") is None:
        raise SpecError("baseline", None, "peft is not installed", "Install it: pip install 'heddle[baselines]'")


def load_peft(
    base: Path,
    adapters: Mapping[str, Path],
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization = Quantization.NF4,
) -> PeftRunner:
    """Loads a transformers folder and PEFT folders. Raises SpecError naming the one that cannot be loaded."""
    require_peft()
    from peft import PeftModel

    disable_progress_bar()
    model = _load_base(base, device, dtype, quantization)
    # Names of our own: PEFT takes no dots in a name, and none that is part of "lora_".
    peft_names = {name: f"number-{number}" for number, name in enumerate(adapters)}
    peft_model: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads properties that transformers deprecates
        for name, folder in adapters.items():
            options = {"adapter_name": peft_names[name], "torch_device": str(device)}
            try:
                if peft_model is None:
                    peft_model = PeftModel.from_pretrained(model, folder, **options)
                else:
                    peft_model.load_adapter(folder, **options)
            except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
                problem = f"PEFT cannot load it over this base: {error}"
                raise SpecError(
                    "adapters", folder, problem, "Leave it out, or name the base it was made for"
                ) from error
    return PeftRunner(peft_model.eval(), peft_names)


def _load_base(base: Path, device: torch.device, dtype: torch.dtype, quantization: Quantization) -> Any:
    options: dict[str, Any] = {}
    if quantization is Quantization.NF4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        return AutoModelForCausalLM.from_pretrained(
            base, local_files_only=True, dtype=dtype, device_map={"": device}, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        problem = f"transformers cannot load it: {error}"
        raise SpecError("base", base, problem, "Name a folder as save_pretrained writes it") from error


def _take_end_token_ids(model: Any) -> frozenset[int]:
    """The end-of-sequence tokens, which `generate` no longer knows afterwards.

    Each request decides by itself whether they end it; `generate` can only stop at them for all or for none.
    """
    settings = model.generation_config
    found = settings.eos_token_id if settings.eos_token_id is not None else model.config.eos_token_id
    settings.eos_token_id = None
    settings.pad_token_id = PAD_TOKEN_ID
    return frozenset(found if isinstance(found, list) else () if found is None else (found,))
