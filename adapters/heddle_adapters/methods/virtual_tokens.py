"""Prompt tuning and its kin: rows that stand before every prompt, as if they were tokens of it.

Format: PEFT's `tuners/prompt_tuning`, `p_tuning`, `cpt` and `multitask_prompt_tuning`, files of peft 0.21.
`prompt_embeddings` [num_virtual_tokens, hidden_size] holds what the embedding answers: whatever made it (P-tuning's
encoder, CPT's step away from real tokens) has been applied when PEFT saves, and CPT's masks weigh its loss alone.

Multitask prompt tuning multiplies that, element by element, by the matrix of one task: `prefix_task_cols`
[num_tasks, num_virtual_tokens, num_ranks] @ `prefix_task_rows` [num_tasks, num_ranks, hidden_size]. PEFT takes the
task's number with every call; here an adapter is one task, named by the config's own field `heddle_task`, which may be
missing where there is one task only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import TokenRows
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE
from heddle_adapters.positions import Positions
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

PROMPT, TASK_COLUMNS, TASK_ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
MAX_VIRTUAL_TOKENS = 1024

READ_FIELDS = frozenset({"num_transformer_submodules", "num_virtual_tokens"})
TASK_FIELDS = frozenset({"heddle_task", "num_ranks", "num_tasks"})

# Sizes of the base, how the rows were initialised, what encoded them while they were trained, how CPT was trained.
HARMLESS_FIELDS = frozenset(
    {
        "cpt_mask",
        "cpt_token_ids",
        "cpt_tokens_type_mask",
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
        "num_attention_heads",
        "num_layers",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
        "opt_weighted_loss_type",
        "prompt_tuning_init",
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
        "prompt_tuning_init_text",
        "token_dim",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)


@dataclass(frozen=True)
class Task:
    """One task of a multitask prompt."""

    number: int
    num_tasks: int
    num_ranks: int


@dataclass(frozen=True, kw_only=True)
class VirtualTokenSource(Source):
    """The rows in the file."""

    first_id: int
    task: Task | None

    def build(self, tensors: Tensors, base: BaseWeights) -> TokenRows:
        values = tensors.read(PROMPT)
        if self.task is not None:
            number = self.task.number
            values = values * (tensors.read(TASK_COLUMNS)[number] @ tensors.read(TASK_ROWS)[number])
        return TokenRows(np.arange(self.first_id, self.first_id + len(values)), values)


@dataclass(frozen=True)
class VirtualTokens:
    """The settings of one adapter that is a prompt."""

    label: str
    num_tokens: int
    task: Task | None = None
    combination: ClassVar[Literal["alone"]] = "alone"
    positions: ClassVar[Positions] = Positions()
    refused_parts: ClassVar[Mapping[str, str]] = {}
    integer_parts: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, label: str, config: AdapterConfig) -> VirtualTokens:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        return cls(label, promised_length(config, MAX_VIRTUAL_TOKENS))

    @classmethod
    def of_one_task(cls, config: AdapterConfig) -> VirtualTokens:
        config.check_fields(read=READ_FIELDS | TASK_FIELDS, harmless=HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        num_tasks = config.rank("num_tasks", default=1)
        number = config.fields.get("heddle_task")
        if number is None and num_tasks == 1:
            number = 0
        if type(number) is not int or not 0 <= number < num_tasks:
            config.refuse(
                "heddle_task",
                f"must be the number of the task that this adapter is to serve, 0 to {num_tasks - 1}: add it to the "
                "file, and upload once for each task.",
            )
        task = Task(number, num_tasks, config.rank("num_ranks", default=1))
        return cls("multitask prompt tuning", promised_length(config, MAX_VIRTUAL_TOKENS), task)

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {} if self.task is None else {"task": self.task.number}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[VirtualTokenSource, ...]:
        if base.embedding is None:
            message = f"{base.model_name} has no token embedding, before which {self.label} could put its rows."
            raise AdapterIncompatible(message, param=CONFIG_FILE)
        hidden_size = base.site(base.embedding).out_features
        shapes: dict[str, tuple[int, ...]] = {PROMPT: (self.num_tokens, hidden_size)}
        check_promise(tensors, PROMPT, (self.num_tokens, None))
        if self.task is not None:
            num_tasks, num_ranks = self.task.num_tasks, self.task.num_ranks
            shapes[TASK_COLUMNS] = (num_tasks, self.num_tokens, num_ranks)
            shapes[TASK_ROWS] = (num_tasks, num_ranks, hidden_size)
            check_promise(tensors, TASK_COLUMNS, shapes[TASK_COLUMNS])
            check_promise(tensors, TASK_ROWS, (num_tasks, num_ranks, None))
        source = VirtualTokenSource(
            site=base.embedding,
            shapes=shapes,
            num_row_values=self.num_tokens * hidden_size,
            num_virtual_tokens=self.num_tokens,
            first_id=base.vocabulary_size,
            task=self.task,
        )
        return (source,)


def promised_length(config: AdapterConfig, at_most: int) -> int:
    """The config's number of virtual tokens; raises `InvalidAdapter` for none, too many, and those of an encoder."""
    if config.fields.get("num_transformer_submodules") not in (None, 1):
        config.refuse("num_transformer_submodules", "is not 1: prompts for encoder-decoder models are not served.")
    num_tokens = config.rank("num_virtual_tokens", default=0)
    if num_tokens > at_most:
        config.refuse("num_virtual_tokens", f"is {num_tokens}; at most {at_most} are served.")
    return num_tokens


def check_promise(tensors: Mapping[str, TensorInfo], name: str, promised: tuple[int | None, ...]) -> None:
    """Raises `InvalidAdapter` unless the file has the tensor in the config's sizes; None is a size of the base's."""
    shape = tensors[name].shape if name in tensors else None
    if shape is None or len(shape) != len(promised):
        found = "is missing" if shape is None else f"has shape {list(shape)}"
        message = f"{WEIGHTS_FILE}: {name} {found}; it must have {len(promised)} dimensions: save the adapter again."
        raise InvalidAdapter(message, param=WEIGHTS_FILE)
    if any(expected not in (None, size) for size, expected in zip(shape, promised, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in promised)
        message = (
            f"{WEIGHTS_FILE}: {name} has shape {list(shape)}, but {CONFIG_FILE} (num_virtual_tokens, num_tasks, "
            f"num_ranks) says [{sizes}]; upload the config that was saved with these weights."
        )
        raise InvalidAdapter(message, param=WEIGHTS_FILE)
