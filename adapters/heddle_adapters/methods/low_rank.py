"""LoRA and its relatives: `y += s * (B (A x) + b)`, at every site of a rank and a scale of its own.

Format: PEFT's `tuners/lora`, files of peft 0.21. Per targeted module `lora_A.weight` [r, in_features],
`lora_B.weight` [out_features, r] and, with `lora_bias`, `lora_B.bias` [out_features], which is scaled too; for an
embedding `lora_embedding_A` [r, vocabulary] and `lora_embedding_B` [hidden_size, r].
s = alpha / r, or alpha / sqrt(r) with `use_rslora`; r and alpha are the config's unless a pattern names the module.

    DoRA           y = m / ||W + s B A|| * (W + s B A) x, norms over each output; m is `lora_magnitude_vector` [out]
    aLoRA          plain, from the place in the prompt on where `alora_invocation_tokens` stand
    BD-LoRA        A [r, in / n] or B [out, r / n] of n blocks, which lie below each other in the file
    PiSSA, OLoRA   over the base less the part that A and B started from, unless they were converted when saved
    KaSA           s B diag(e) A, e being `lora_diag` [r], over the base less its least singular values' part

rsLoRA, LoRA+, LoRA-FA, LongLoRA, EVA, MiCA, orthogonal and Gaussian initialisation are plain in their files, and so is
LoftQ over the base that it quantised. VeLoRA and MonteCLoRA are plain but in training, which left tensors of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout, Site, SiteKind
from heddle_adapters.bounded_json import Json
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter, quoted
from heddle_adapters.methods.block_structure import BlockStructure
from heddle_adapters.methods.companions import COMPANION_FIELDS, Companions
from heddle_adapters.methods.low_rank_parts import DecomposedSource, LowRankSource, ResidualSource
from heddle_adapters.methods.removed_parts import RemovedPart
from heddle_adapters.methods.trained_tokens import token_ids
from heddle_adapters.module_pattern import ModulePattern
from heddle_adapters.positions import Positions
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import Source
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
MAGNITUDE, DIAGONAL = "lora_magnitude_vector", "lora_diag"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
BASE_COPY = "base_layer.weight"
MAX_ABSOLUTE_SCALE = 1e4
MAX_INVOCATION_TOKENS = 256

Variant = Literal["plain", "DoRA", "aLoRA", "BD-LoRA", "KaSA", "PiSSA", "OLoRA"]
KINDS: tuple[SiteKind, ...] = ("linear", "embedding")
REMOVED_PARTS: Mapping[Variant, RemovedPart] = {
    "KaSA": "smallest values",
    "PiSSA": "largest values",
    "OLoRA": "leading columns",
}

READ_FIELDS = COMPANION_FIELDS | {
    "alora_invocation_tokens",
    "alpha_pattern",
    "init_lora_weights",
    "kasa_config",
    "lora_alpha",
    "lora_bias",
    "monteclora_config",
    "r",
    "rank_pattern",
    "use_bdlora",
    "use_dora",
    "use_rslora",
    "velora_config",
}

# By config field: tensors that only training reads (`VeloraLinearVariant`, `MontecloraLinearVariant`).
TRAINING_PARTS: Mapping[str, tuple[str, ...]] = {
    "monteclora_config": tuple(
        f"lora_monteclora_sampler.{name}"
        for name in ("expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior")
    ),
    "velora_config": ("lora_velora_embed",),
}

# The *_config fields matter only with the initialisation of the same name.
HARMLESS_FIELDS = frozenset(
    {
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
    }
)

REFUSED_FIELDS = {
    "arrow_config": (
        "is set: Arrow weighs several adapters, which lie in other files, anew for each token; upload those adapters "
        "one by one and mix them with fixed weights."
    ),
    "layer_replication": (
        "is set: it repeats layers of the base, which all adapters share here; train on the base as it is served."
    ),
    "megatron_config": "is set, and Megatron layers are not served; save the adapter for the transformers model.",
    "target_parameters": (
        "is set: it adapts bare parameters, such as the fused experts of a mixture, and this server attaches adapters "
        "to modules only; list linear layers in target_modules instead."
    ),
    "use_qalora": (
        "is true: QA-LoRA averages the inputs over the groups of a GPTQ base, and this server has none; train with "
        "use_qalora=False."
    ),
}

REFUSED_PARTS = {
    BIAS: "the config has lora_bias false; set it if the adapter was trained with it",
    MAGNITUDE: "the config has use_dora false; set it if the adapter was trained with it",
    DIAGONAL: "the config has no kasa_config; upload the config that was saved with these weights",
}

# Initialisations that leave the base alone, so that A and B say everything; and those whose change can be recomputed.
PLAIN_INITIALISATIONS = (True, False, None, "eva", "gaussian", "mica", "orthogonal")
CHANGING_INITIALISATIONS: Mapping[str, Variant] = {"olora": "OLoRA", "pissa": "PiSSA"}
CONVERT = (
    "convert the adapter when saving it (save_pretrained's path_initial_model_for_weight_conversion), or train with "
    "init_lora_weights=True"
)


@dataclass(frozen=True)
class LowRank:
    """The settings of one LoRA adapter."""

    label: str
    variant: Variant
    rank: int
    alpha: float
    rank_pattern: ModulePattern
    alpha_pattern: ModulePattern
    is_rank_stabilised: bool
    has_bias: bool
    blocks: BlockStructure
    invocation: tuple[int, ...]
    training_parts: tuple[str, ...]
    companions: Companions
    integer_parts: ClassVar[frozenset[str]] = frozenset()
    refused_parts: ClassVar[Mapping[str, str]] = REFUSED_PARTS

    @classmethod
    def from_config(cls, config: AdapterConfig) -> LowRank:
        config.check_fields(read=READ_FIELDS, harmless=HARMLESS_FIELDS, refused=REFUSED_FIELDS)
        variant, companions = _variant(config), Companions.from_config(config, "lora_only")
        is_rank_stabilised, has_bias = config.flag("use_rslora"), config.flag("lora_bias")
        if has_bias and variant not in ("plain", "aLoRA", "KaSA"):
            config.refuse("lora_bias", f"is true, which {variant} does not go with; train without one of them.")
        if variant == "aLoRA" and not companions.are_none:
            config.refuse(
                "alora_invocation_tokens",
                "is set together with trained biases, whole modules or tokens, which act on all of a prompt and not "
                "from the invocation on; train without them.",
            )
        if variant in ("KaSA", "OLoRA") and companions.is_transposed:
            config.refuse("fan_in_fan_out", f"is true, which {variant} does not go with; train without {variant}.")
        is_loftq = config.fields.get("init_lora_weights") == "loftq"
        plain = "LoftQ" if is_loftq else "rsLoRA" if is_rank_stabilised else "LoRA"
        return cls(
            label=plain if variant == "plain" else variant,
            variant=variant,
            rank=config.rank("r", default=8),
            alpha=config.number("lora_alpha", default=8),
            rank_pattern=config.rank_pattern("rank_pattern"),
            alpha_pattern=config.number_pattern("alpha_pattern"),
            is_rank_stabilised=is_rank_stabilised,
            has_bias=has_bias,
            blocks=BlockStructure.from_config(config),
            invocation=_invocation(config),
            training_parts=tuple(
                part for field, parts in TRAINING_PARTS.items() if config.fields.get(field) for part in parts
            ),
            companions=companions,
        )

    @property
    def combination(self) -> Literal["sum", "alone"]:
        is_sum = self.variant not in ("DoRA", "aLoRA") and self.companions.are_sums
        return "sum" if is_sum else "alone"

    @property
    def positions(self) -> Positions:
        return Positions(invocation=self.invocation)

    @property
    def scalars(self) -> Mapping[str, Json]:
        scalars: dict[str, Json] = {
            "alpha": self.alpha,
            "alpha_pattern": [[key.path, key.is_whole_path, value] for key, value in self.alpha_pattern.values.items()],
            "has_bias": self.has_bias,
            "is_rank_stabilised": self.is_rank_stabilised,
            **self.blocks.scalars,
            **self.companions.scalars,
        }
        if self.variant != "plain":
            scalars |= {"variant": self.variant, "invocation": [*self.invocation]}
        return scalars

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[Source, ...]:
        optional = {BIAS: self.has_bias, MAGNITUDE: self.variant == "DoRA", DIAGONAL: self.variant == "KaSA"}
        parts = (A, B, *(part for part, is_there in optional.items() if is_there))
        every_part = (*parts, *self.training_parts, EMBEDDING_A, EMBEDDING_B, BASE_COPY)
        self._check_base(base)
        own = [self._source(each, parts, base) for each in by_site(tensors.values(), every_part, base, *KINDS)]
        return self.companions.beside(own, tensors, base)

    def _source(self, found: SiteTensors, parts: tuple[str, ...], base: BaseLayout) -> LowRankSource:
        if found.site.kind == "embedding":
            return self._embedding(found)
        site, rank = found.site, self._rank(found, A)
        if self.variant in REMOVED_PARTS:
            self._check_removed_part(site, rank, base)
        blocks_a, blocks_b = self.blocks.counts(site, rank)
        fitting = {
            A: (rank, site.in_features // blocks_a),
            B: (site.out_features, rank // blocks_b),
            BIAS: (site.out_features,),
            MAGNITUDE: (site.out_features,),
            DIAGONAL: (rank,),
        }
        names = {part: found.require(part).name for part in parts}
        shapes = {name: fitting[part] for part, name in names.items()}
        shapes |= {
            found.parts[part].name: found.parts[part].shape for part in self.training_parts if part in found.parts
        }
        base_copy = found.parts.get(BASE_COPY) if site.path == base.head else None
        num_rows = 2 * rank if self.variant in REMOVED_PARTS else rank
        source = LowRankSource(
            site=site.path,
            shapes=_with_copy(shapes, base_copy, site),
            num_rows=num_rows,
            num_row_values=num_rows * (site.in_features + site.out_features),
            num_vector_values=site.out_features if self.has_bias or self.variant == "DoRA" else 0,
            a=names[A],
            b=names[B],
            bias=names.get(BIAS),
            diagonal=names.get(DIAGONAL),
            scale=self._scale(site.path, rank),
            num_blocks_a=blocks_a,
            num_blocks_b=blocks_b,
            base_copy=base_copy,
        )
        if self.variant == "DoRA":
            return DecomposedSource(**vars(source), magnitude=names[MAGNITUDE])
        if self.variant in REMOVED_PARTS:
            return ResidualSource(**vars(source), removed=REMOVED_PARTS[self.variant], rank=rank)
        return source

    def _embedding(self, found: SiteTensors) -> LowRankSource:
        if self.variant in ("DoRA", "aLoRA", "BD-LoRA", "KaSA"):
            message = (
                f"{WEIGHTS_FILE} adapts the embedding {found.site.path}, and {self.variant} is served on linear layers "
                "only; leave the embedding out of target_modules."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        site, rank = found.site, self._rank(found, EMBEDDING_A)
        a, b, base_copy = found.require(EMBEDDING_A).name, found.require(EMBEDDING_B).name, found.parts.get(BASE_COPY)
        return LowRankSource(
            site=site.path,
            shapes=_with_copy({a: (rank, site.in_features), b: (site.out_features, rank)}, base_copy, site),
            num_rows=rank,
            num_row_values=rank * (site.in_features + site.out_features),
            a=a,
            b=b,
            scale=self._scale(site.path, rank) * site.output_scale,
            base_copy=base_copy,
        )

    def _check_base(self, base: BaseLayout) -> None:
        unknown = [token_id for token_id in self.invocation if token_id >= base.vocabulary_size]
        if unknown:
            message = (
                f"{CONFIG_FILE}: alora_invocation_tokens holds {unknown[0]}, and the tokens of {base.model_name} "
                f"end at {base.vocabulary_size - 1}; upload it where the base it was trained on is served."
            )
            raise AdapterIncompatible(message, param=CONFIG_FILE)
        if self.variant in REMOVED_PARTS and base.quantization != "none":
            message = (
                f"{CONFIG_FILE}: {self.variant} took a part of the base's weights away before training, which cannot "
                f"be found again in weights that are quantised ({base.quantization}), as this server's are; {CONVERT}."
            )
            raise InvalidAdapter(message, param=CONFIG_FILE)

    def _check_removed_part(self, site: Site, rank: int, base: BaseLayout) -> None:
        least = min(site.in_features, site.out_features)
        if rank > least or (rank == least and self.variant == "KaSA"):
            message = (
                f"{CONFIG_FILE}: rank {rank} is too large for {self.variant} on {site.path}, whose weight is "
                f"{site.out_features} x {site.in_features}; upload the config that was saved with these weights."
            )
            raise InvalidAdapter(message, param=CONFIG_FILE)
        if site.path == base.head and base.head_is_tied:
            message = (
                f"{CONFIG_FILE}: {self.variant} changed the weight of {site.path}, and with it the embedding, which is "
                f"the same weight; {CONVERT}."
            )
            raise InvalidAdapter(message, param=CONFIG_FILE)

    def _rank(self, found: SiteTensors, part: str) -> int:
        """The rank of the file's A, if the config agrees."""
        shape = found.require(part).shape
        promised = self.rank_pattern.value_for(found.site.path, self.rank)
        if not shape or shape[0] != promised:
            message = (
                f"{WEIGHTS_FILE}: {part} of {found.site.path} has shape {list(shape)}, but {CONFIG_FILE} gives that "
                f"module rank {promised:g} (r, rank_pattern); upload the config that was saved with these weights."
            )
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        return shape[0]

    def _scale(self, module: str, rank: int) -> float:
        alpha = self.alpha_pattern.value_for(module, self.alpha)
        return bounded_scale(alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank), module)


def bounded_scale(scale: float, module: str) -> float:
    """The scale, if it is one that training could have ended with; raises `InvalidAdapter`."""
    if abs(scale) > MAX_ABSOLUTE_SCALE:
        message = (
            f"{CONFIG_FILE}: lora_alpha or alpha_pattern scales {module} by {scale:g}; "
            f"at most {MAX_ABSOLUTE_SCALE:g} is allowed."
        )
        raise InvalidAdapter(message, param=CONFIG_FILE)
    return scale


def _with_copy(
    shapes: Mapping[str, tuple[int, ...]], base_copy: TensorInfo | None, site: Site
) -> Mapping[str, tuple[int, ...]]:
    if base_copy is None:
        return shapes
    is_embedding = site.kind == "embedding"
    weight = (site.in_features, site.out_features) if is_embedding else (site.out_features, site.in_features)
    return {**shapes, base_copy.name: weight}


def _variant(config: AdapterConfig) -> Variant:
    initialisation = config.fields.get("init_lora_weights", True)
    if isinstance(initialisation, str):
        initialisation = initialisation.lower()
    config.flag("use_dora")
    asked: dict[str, Variant] = {}
    if isinstance(initialisation, str) and initialisation in CHANGING_INITIALISATIONS:
        asked["init_lora_weights"] = CHANGING_INITIALISATIONS[initialisation]
    elif initialisation == "loftq":
        _check_loftq(config)
    elif initialisation not in PLAIN_INITIALISATIONS:
        shown = quoted(config.fields["init_lora_weights"])
        config.refuse("init_lora_weights", f"is {shown}, so A and B belong to a base that it changed; {CONVERT}.")
    flags: Mapping[str, Variant] = {"use_dora": "DoRA", "use_bdlora": "BD-LoRA", "alora_invocation_tokens": "aLoRA"}
    asked |= {field: variant for field, variant in flags.items() if config.fields.get(field)}
    if config.fields.get("kasa_config") is not None:  # an empty object means its defaults
        asked["kasa_config"] = "KaSA"
    if len(asked) > 1:
        config.refuse(" and ".join(asked), "are set together, which PEFT does not train; upload the saved config.")
    return next(iter(asked.values()), "plain")


def _check_loftq(config: AdapterConfig) -> None:
    if config.text("heddle_base_fingerprint") is None:
        config.refuse(
            "init_lora_weights",
            "is 'loftq', so A and B belong to the base that LoftQ quantised; if that is the base of this server, say "
            "so with its fingerprint in heddle_base_fingerprint, or train with init_lora_weights=True.",
        )


def _invocation(config: AdapterConfig) -> tuple[int, ...]:
    value = config.fields.get("alora_invocation_tokens")
    if not value:
        return ()
    if not isinstance(value, list) or len(value) > MAX_INVOCATION_TOKENS:
        config.refuse(
            "alora_invocation_tokens",
            f"must be a list of at most {MAX_INVOCATION_TOKENS} token ids, not {quoted(value)}.",
        )
    return token_ids(config, "alora_invocation_tokens", value)
