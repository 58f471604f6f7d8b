"""Which matrices of a BD-LoRA are block-diagonal, and of how many blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import Site
from heddle_adapters.bounded_json import Json
from heddle_adapters.errors import InvalidAdapter, listed, quoted

FIELD = "use_bdlora"
MEMBERS = frozenset({"match_strict", "nblocks", "target_modules_bd_a", "target_modules_bd_b"})


@dataclass(frozen=True)
class BlockStructure:
    """What `use_bdlora` says; modules are named by any part of their paths (peft 0.21, `BdLoraLinearVariant`)."""

    num_blocks: int = 1
    in_a: tuple[str, ...] = ()
    in_b: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: AdapterConfig) -> BlockStructure:
        value = config.fields.get(FIELD)
        if not value:
            return cls()
        if not isinstance(value, dict):
            config.refuse(FIELD, f"must be an object, not {quoted(value)}.")
        unknown = [quoted(name) for name in value if name not in MEMBERS]
        if unknown:
            config.refuse(
                FIELD, f"has members that this server does not know: {listed(unknown)}; unset them or retrain."
            )
        inner = AdapterConfig(value)
        return cls(
            num_blocks=inner.rank("nblocks", default=1),
            in_a=inner.module_paths("target_modules_bd_a"),
            in_b=inner.module_paths("target_modules_bd_b"),
        )

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"blocks": [self.num_blocks, [*self.in_a], [*self.in_b]]} if self.in_a or self.in_b else {}

    def counts(self, site: Site, rank: int) -> tuple[int, int]:
        """The number of blocks of A and of B at one site; raises `InvalidAdapter` where they cannot be."""
        is_in_a, is_in_b = (any(part in site.path for part in parts) for parts in (self.in_a, self.in_b))
        width = site.in_features if is_in_a else site.out_features
        if (is_in_a and is_in_b) or ((is_in_a or is_in_b) and (width % self.num_blocks or rank % self.num_blocks)):
            message = (
                f"{CONFIG_FILE}: {FIELD} makes both A and B of {site.path} block-diagonal, or its {self.num_blocks} "
                f"blocks do not divide rank {rank} and width {width}; upload the config saved with these weights."
            )
            raise InvalidAdapter(message, param=CONFIG_FILE)
        return self.num_blocks if is_in_a else 1, self.num_blocks if is_in_b else 1
