"""LoRA and rsLoRA: `y += s * (B (A x) + b)`, at every site of a rank and a scale of its own.

Format: PEFT's `tuners/lora`, files of peft 0.21. Per targeted module `lora_A.weight` [r, in_features],
`lora_B.weight` [out_features, r] and, with `lora_bias`, `lora_B.bias` [out_features], which is scaled too.
s = alpha / r, or alpha / sqrt(r) with `use_rslora`; r and alpha are the config's unless a pattern names the module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, SiteUpdate
from heddle_adapters.errors import InvalidAdapter, quoted
from heddle_adapters.module_pattern import ModulePattern
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
MAX_ABSOLUTE_SCALE = 1e4

READ_FIELDS = frozenset(
    {"alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_bias", "r", "rank_pattern", "use_rslora"}
)

# The *_config fields matter only with the initialisation of the same name; `fan_in_fan_out` says how the base stores
# W, never how A and B lie; VeLoRA changes training alone.
HARMLESS_FIELDS = frozenset(
    {
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "velora_config",
    }
)

REFUSED_FIELDS = {
    "alora_invocation_tokens": "is set, and activated LoRA is not served; train without it.",
    "arrow_config": "is set, and Arrow's routing over several adapters is not served; upload the adapters one by one.",
    "kasa_config": "is set: KaSA also truncates the base's weights, which all adapters share; train without it.",
    "layer_replication": "is set: it changes the base, which all adapters share; train without it.",
    "megatron_config": "is set, and Megatron layers are not served; save the adapter for the transformers model.",
    "modules_to_save": "is set: whole modules of the base are not replaced; train without it.",
    "monteclora_config": "is set, and MonteCLoRA is not served; train without it.",
    "target_parameters": "is set, and adapters on bare parameters (fused experts) are not served; target modules.",
    "trainable_token_indices": "is set, and trained token rows are not served; train without it.",
    "use_bdlora": "is set, and block-diagonal LoRA is not served; train without it.",
    "use_dora": "is true, and DoRA is not served; train with use_dora=False.",
    "use_qalora": "is true: QA-LoRA needs a GPTQ base; train with use_qalora=False.",
}

REFUSED_PARTS = {
    "lora_embedding_A": "LoRA on an embedding is not served; leave the embedding out of target_modules",
    "lora_embedding_B": "LoRA on an embedding is not served; leave the embedding out of target_modules",
    "lora_magnitude_vector": "DoRA is not served; train with use_dora=False",
    BIAS: "the config has lora_bias false; set it if the adapter was trained with it",
}

# Initialisations that leave the base alone, so that A and B say everything.
PLAIN_INITIALISATIONS = (True, False, None, "eva", "gaussian", "mica", "orthogonal")


@dataclass(frozen=True)
class LowRankSource:
    """One site's A, B and perhaps bias in the file."""

    layer: Site
    names: Mapping[str, str]  # part to tensor name
    num_rows: int
    scale: float
    vector_width: int

    @property
    def site(self) -> str:
        return self.layer.path

    @property
    def row_width(self) -> int:
        return self.layer.in_features + self.layer.out_features

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        fitting = {
            A: (self.num_rows, self.layer.in_features),
            B: (self.layer.out_features, self.num_rows),
            BIAS: (self.layer.out_features,),
        }
        return {name: fitting[part] for part, name in self.names.items()}

    def build(self, read: Callable[[str], Floats]) -> SiteUpdate:
        return SiteUpdate(
            site=self.site,
            a=read(self.names[A]),
            b=np.ascontiguousarray(read(self.names[B]).T),
            gain=np.full(self.num_rows, self.scale, np.float32),
            c=np.zeros(self.num_rows, np.float32),
            bias=np.float32(self.scale) * read(self.names[BIAS]) if BIAS in self.names else None,
        )


@dataclass(frozen=True)
class LowRank:
    """The settings of one LoRA adapter."""

    rank: int
    alpha: float
    rank_pattern: ModulePattern
    alpha_pattern: ModulePattern
    is_rank_stabilised: bool
    has_bias: bool
    combination: ClassVar[Literal["sum"]] = "sum"
    refused_parts: ClassVar[Mapping[str, str]] = REFUSED_PARTS

    @classmethod
    def from_config(cls, config: AdapterConfig) -> LowRank:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=REFUSED_FIELDS)
        if config.fields.get("bias") not in (None, "none"):
            config.refuse(
                "bias", "is not 'none', and trained biases of the base are not served; train with bias='none'."
            )
        if config.fields.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
            config.refuse(
                "init_lora_weights",
                f"is {quoted(config.fields['init_lora_weights'])}, so A and B belong to a base that it changed; "
                "convert the adapter when saving it (save_pretrained's path_initial_model_for_weight_conversion), or "
                "train with init_lora_weights=True.",
            )
        return cls(
            rank=config.rank("r", default=8),
            alpha=config.number("lora_alpha", default=8),
            rank_pattern=config.rank_pattern("rank_pattern"),
            alpha_pattern=config.number_pattern("alpha_pattern"),
            is_rank_stabilised=config.flag("use_rslora"),
            has_bias=config.flag("lora_bias"),
        )

    @property
    def label(self) -> str:
        return "rsLoRA" if self.is_rank_stabilised else "LoRA"

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {
            "alpha": self.alpha,
            "alpha_pattern": [[key.path, key.is_whole_path, value] for key, value in self.alpha_pattern.values.items()],
            "has_bias": self.has_bias,
            "is_rank_stabilised": self.is_rank_stabilised,
        }

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[LowRankSource, ...]:
        parts = (A, B, BIAS) if self.has_bias else (A, B)
        return tuple(self._source(found, parts) for found in by_site(tensors.values(), parts, base))

    def _source(self, found: SiteTensors, parts: tuple[str, ...]) -> LowRankSource:
        names = {part: found.require(part).name for part in parts}
        rank = self._rank(found)
        return LowRankSource(
            layer=found.site,
            names=names,
            num_rows=rank,
            scale=self._scale(found.site.path, rank),
            vector_width=found.site.out_features if self.has_bias else 0,
        )

    def _rank(self, found: SiteTensors) -> int:
        """The rank of the file's A, if the config agrees."""
        shape = found.require(A).shape
        promised = self.rank_pattern.value_for(found.site.path, self.rank)
        if not shape or shape[0] != promised:
            message = (
                f"{WEIGHTS_FILE}: {A} of {found.site.path} has shape {list(shape)}, but {CONFIG_FILE} gives that "
                f"module rank {promised:g} (r, rank_pattern); upload the config that was saved with these weights."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        return shape[0]

    def _scale(self, module: str, rank: int) -> float:
        alpha = self.alpha_pattern.value_for(module, self.alpha)
        scale = alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)
        if abs(scale) > MAX_ABSOLUTE_SCALE:
            message = (
                f"{CONFIG_FILE}: lora_alpha or alpha_pattern scales {module} by {scale:g}; "
                f"at most {MAX_ABSOLUTE_SCALE:g} is allowed."
            )
            raise InvalidAdapter(message, param=CONFIG_FILE)
        return scale
