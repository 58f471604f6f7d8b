"""AdaLoRA: `y += s * B (E * (A x))`, where training has set most of E to zero and saving left those rows out.

Format: PEFT's `tuners/adalora`, files of peft 0.21. Per targeted module `lora_A` [r, in_features], `lora_B`
[out_features, r] and `lora_E` [r, 1]. r is the config's `init_r`, or the number of rows that `rank_pattern` keeps: a
list of booleans for each module. s = alpha / (init_r + 1e-5) in both cases: PEFT keeps the first divisor when it drops
rows (`tuners/adalora/model.py:resize_modules_by_rank_pattern`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.errors import InvalidAdapter, quoted
from heddle_adapters.methods.companions import COMPANION_FIELDS, Companions
from heddle_adapters.methods.low_rank import REFUSED_FIELDS as LORA_REFUSED_FIELDS
from heddle_adapters.methods.low_rank import bounded_scale
from heddle_adapters.methods.low_rank_parts import LowRankSource
from heddle_adapters.positions import Positions
from heddle_adapters.site_tensors import PEFT_PREFIX, SiteTensors, by_site
from heddle_adapters.source import Source
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

A, B, E = "lora_A", "lora_B", "lora_E"
BASE_COPY = "base_layer.weight"
DIVISOR_OFFSET = 1e-5

READ_FIELDS = COMPANION_FIELDS | {"init_r", "lora_alpha", "rank_pattern"}

# Of the training schedule, or LoRA's own, which AdaLoRA's layers do not look at.
HARMLESS_FIELDS = frozenset(
    {
        "alpha_pattern",
        "beta1",
        "beta2",
        "corda_config",
        "deltaT",
        "eva_config",
        "init_lora_weights",
        "loftq_config",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "orth_reg_weight",
        "qalora_group_size",
        "r",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
        "use_rslora",
        "velora_config",
    }
)

REFUSED_FIELDS = LORA_REFUSED_FIELDS | dict.fromkeys(
    ("alora_invocation_tokens", "kasa_config", "monteclora_config", "use_bdlora", "use_dora"),
    "is set, which AdaLoRA does not go with; train with one of them.",
)


@dataclass(frozen=True)
class AdaptiveRank:
    """The settings of one AdaLoRA adapter."""

    initial_rank: int
    alpha: float
    ranks: Mapping[str, int]  # by module path
    companions: Companions
    label: ClassVar[str] = "AdaLoRA"
    positions: ClassVar[Positions] = Positions()
    integer_parts: ClassVar[frozenset[str]] = frozenset()
    refused_parts: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_config(cls, config: AdapterConfig) -> AdaptiveRank:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=REFUSED_FIELDS)
        return cls(
            initial_rank=config.rank("init_r", default=12),
            alpha=config.number("lora_alpha", default=8),
            ranks=_ranks(config),
            companions=Companions.from_config(config, "lora_only"),
        )

    @property
    def combination(self) -> Literal["sum", "alone"]:
        return "sum" if self.companions.are_sums else "alone"

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"alpha": self.alpha, "initial_rank": self.initial_rank, **self.companions.scalars}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[Source, ...]:
        own = [self._source(found, base) for found in by_site(tensors.values(), (A, B, E, BASE_COPY), base)]
        return self.companions.beside(own, tensors, base)

    def _source(self, found: SiteTensors, base: BaseLayout) -> LowRankSource:
        site, rank = found.site, self._rank(found)
        a, b, diagonal = (found.require(part).name for part in (A, B, E))
        shapes = {a: (rank, site.in_features), b: (site.out_features, rank), diagonal: (rank, 1)}
        base_copy = found.parts.get(BASE_COPY) if site.path == base.head else None
        if base_copy is not None:
            shapes[base_copy.name] = (site.out_features, site.in_features)
        # PEFT takes the rank for an alpha that is not positive.
        alpha = self.alpha if self.alpha > 0 else self.initial_rank
        return LowRankSource(
            site=site.path,
            shapes=shapes,
            num_rows=rank,
            num_row_values=rank * (site.in_features + site.out_features),
            a=a,
            b=b,
            diagonal=diagonal,
            scale=bounded_scale(alpha / (self.initial_rank + DIVISOR_OFFSET), site.path),
            base_copy=base_copy,
        )

    def _rank(self, found: SiteTensors) -> int:
        """The rank of the file's A, if the config agrees."""
        shape = found.require(A).shape
        promised = self.ranks.get(found.site.path, self.initial_rank)
        if not shape or shape[0] != promised:
            message = (
                f"{WEIGHTS_FILE}: {A} of {found.site.path} has shape {list(shape)}, but {CONFIG_FILE} gives that "
                f"module rank {promised} (init_r, rank_pattern); upload the config that was saved with these weights."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        return shape[0]


def _ranks(config: AdapterConfig) -> Mapping[str, int]:
    """`rank_pattern`: "<module path>.lora_E" to a list of booleans, one for each row of before."""
    pattern = config.fields.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        config.refuse("rank_pattern", f"must be an object from names of {E} to lists, not {quoted(pattern)}.")
    ranks: dict[str, int] = {}
    for name, kept in pattern.items():
        if not isinstance(kept, list) or not all(isinstance(item, bool) for item in kept):
            config.refuse(f"rank_pattern[{quoted(name)}]", f"must be a list of true and false, not {quoted(kept)}.")
        ranks[name.removesuffix("." + E).removeprefix(PEFT_PREFIX)] = kept.count(True)
    return ranks
