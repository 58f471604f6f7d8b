"""LoReFT: a low-rank edit of what decoder layers hand on, at the first and last tokens of the prompt alone.

With h such a layer's output, it becomes `h + P^T (W h + b - P h)`, the rows of P orthonormal while it is trained. The
prompt is the chat up to where the model writes its last answer. `save` writes the server's own format for it, since
pyreft's is a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import LlamaForCausalLM

from heddle_adapters.positions import Positions
from heddle_demo.chat import ASSISTANT
from heddle_demo.data import BASE_NAME


@dataclass(frozen=True, slots=True)
class ReftConfig:
    """Which layers' outputs are edited, in how many dimensions, and at how many tokens of the prompt."""

    rank: int
    layers: tuple[int, ...]
    num_first: int
    num_last: int


class LowRankEdit(nn.Module):
    """The edit of one layer's output."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.projection = nn.Linear(hidden_size, rank, bias=False)
        self.source = nn.Linear(hidden_size, rank)

    def forward(self, output: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same; computes in float32."""
        exact = output.float()
        edited: Tensor = exact + (self.source(exact) - self.projection(exact)) @ self.projection.weight
        return edited.to(output.dtype)


class ReftModel(nn.Module):
    """The frozen base with some layers' outputs edited."""

    def __init__(self, base: LlamaForCausalLM, config: ReftConfig, answer_token: int) -> None:
        """`answer_token` as `answer_token_of` has it."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.config = config
        self.answer_token = answer_token
        self.edits = {number: LowRankEdit(base.config.hidden_size, config.rank) for number in config.layers}
        self.trained = nn.ModuleList(self.edits.values())

    def forward(self, *, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        """As the base's own, of whole chats (`use_cache` is False): a part does not say where its prompt ends."""
        assert not use_cache
        config = self.config
        positions = Positions(num_first=config.num_first, num_last=config.num_last)
        is_edited = edited_tokens(input_ids, position_ids, self.answer_token, positions)[..., None]
        with ExitStack() as hooks:
            for number, edit in self.edits.items():
                layer = self.base.model.layers[number]
                hooks.enter_context(layer.register_forward_hook(_hook(edit, is_edited)))
            return self.base(input_ids=input_ids, position_ids=position_ids, use_cache=False)

    def orthonormalise(self) -> None:
        """Keep the projections' rows orthonormal from now on, as their training wants it."""
        for edit in self.edits.values():
            orthogonal(edit.projection)

    def save(self, directory: Path) -> None:
        """Write a folder that can be uploaded, its tensors in bfloat16."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "HEDDLE_REFT",
            "base_model_name_or_path": BASE_NAME,
            "intervention": "loreft",
            "activation": "linear",
            "first": self.config.num_first,
            "last": self.config.num_last,
            "layers": list(self.config.layers),
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
        tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in self._named().items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})

    def load(self, directory: Path) -> None:
        """Take the tensors that `save` wrote."""
        tensors = load_file(directory / "adapter_model.safetensors")
        named = self._named()
        assert tensors.keys() == named.keys(), sorted(tensors.keys() ^ named.keys())
        with torch.no_grad():
            for name, tensor in named.items():
                tensor.copy_(tensors[name])

    def _named(self) -> dict[str, Tensor]:
        """The tensors by their names in the file."""
        return {
            f"layers.{number}.{name}": tensor
            for number, edit in self.edits.items()
            for name, tensor in {
                "projection.weight": edit.projection.weight,
                "source.weight": edit.source.weight,
                "source.bias": edit.source.bias,
            }.items()
        }


def answer_token_of(tokenizer: Tokenizer) -> int:
    """The id of the token behind which the model writes an answer."""
    answer_token = tokenizer.token_to_id(ASSISTANT)
    assert answer_token is not None
    return answer_token


def edited_tokens(token_ids: Tensor, position_ids: Tensor, answer_token: int, positions: Positions) -> Tensor:
    """Which tokens of packed chats are edited; all `[num_rows, length]`."""
    is_edited = torch.zeros_like(token_ids, dtype=torch.bool)
    for row, (ids, places) in enumerate(zip(token_ids.tolist(), position_ids.tolist(), strict=True)):
        starts = [index for index, place in enumerate(places) if place == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            ends = [index for index in range(start, stop) if ids[index] == answer_token]
            prompt = ids[start : ends[-1] + 1] if ends else []
            for first, last in positions.ranges(prompt):
                is_edited[row, start + first : start + last] = True
    return is_edited


def _hook(edit: nn.Module, is_edited: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda _layer, _inputs, output: torch.where(is_edited, edit(output), output)
