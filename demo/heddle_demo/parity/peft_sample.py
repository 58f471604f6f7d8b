"""Random adapters that PEFT makes, saves, loads and computes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor


@dataclass(frozen=True)
class PeftSample:
    """One PEFT config."""

    name: str
    config: Callable[[Any], PeftConfig]  # for a base model
    zero_size: float = 0.2  # of numbers that begin at zero
    noise: float = 0.3  # of all others, in the size of their own tensor
    inputs: Mapping[str, int] = field(default_factory=dict)  # that PEFT's model wants beside the tokens
    converts: bool = False  # whether it is saved as a plain LoRA that belongs to the untouched base
    on_plain_base_only: bool = False  # whether no quantised base is what it was trained on
    oracle_name: str = "PEFT"

    def save(self, base: Any, folder: Path, seed: int) -> None:
        with quiet():
            torch.manual_seed(seed)
            model: Any = get_peft_model(copy.deepcopy(base), self.config(base)).eval()
            initial = folder / "initial"
            if self.converts:
                model.peft_config["default"].init_lora_weights = True
                model.save_pretrained(initial)
            randomise(model, self.zero_size, self.noise, seed)
            options = {"path_initial_model_for_weight_conversion": str(initial)} if self.converts else {}
            model.save_pretrained(folder, save_embedding_layers=False, **options)

    def load(self, base: Any, folder: Path, gate: float = 1.0) -> PeftOracle:
        """`gate` multiplies what a LoRA adds."""
        with quiet():
            model: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
            if gate != 1.0:
                for module in model.modules():
                    if isinstance(module, LoraLayer):
                        module.scale_layer(gate)
            return PeftOracle(model, {name: torch.tensor([value]) for name, value in self.inputs.items()})


class PeftOracle:
    """A PeftModel with one active adapter."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor]) -> None:
        self.model = model
        self._inputs = inputs

    @torch.inference_mode()
    def logits(self, token_ids: list[int], num_prompt_tokens: int) -> Tensor:
        with quiet():
            options = {"input_ids": torch.tensor([token_ids]), "use_cache": False, **self._inputs}
            answered: Tensor = self.model(**options).logits[0]
        return answered[-len(token_ids) :].float()  # virtual tokens have logits too


class BaseOracle:
    """The base alone."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def logits(self, token_ids: list[int], num_prompt_tokens: int) -> Tensor:
        answered: Tensor = self.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()
        return answered


@torch.no_grad()
def randomise(model: Any, zero_size: float, noise: float, seed: int) -> None:
    """Move every trained number by a part of its tensor's size, so that nothing is what it began as."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model):
        size = parameter.float().square().mean().sqrt().item()
        moved = torch.randn(parameter.shape, generator=generator)
        parameter.add_((noise * size if size > 1e-6 else zero_size) * moved)


def trained(model: Any) -> Iterator[Tensor]:
    """The trained floating-point parameters, in a fixed order."""
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and parameter.is_floating_point():
            yield parameter


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of what matters to those who train or merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
