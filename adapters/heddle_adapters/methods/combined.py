"""Several adapters in one upload, which act together: LoRA with a prefix, a parallel bottleneck with a prefix, sums.

A format of heddle's own; `combine` writes it. The config's `parts` is a list of objects with a `name`, that part's own
`config`, and perhaps a `gate`, a number that multiplies all that the part adds; without one it is 1. A tensor of a part
is named by the part's name, a slash, and the name it had in the part's own file; no part's name has a slash.

Every part reads the base's own inputs and adds to its outputs, as if it were alone, and so do all of them together.
What replaces or scales is therefore one part's business at every site, and virtual tokens are one part's altogether.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.agreement import check_every_target_is_there, check_types
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Floats, Part, SiteUpdate
from heddle_adapters.errors import InvalidAdapter, listed, quoted
from heddle_adapters.positions import Positions
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

if TYPE_CHECKING:
    from heddle_adapters.method import AdapterMethod, Combination

PEFT_TYPE = "HEDDLE_COMBINED"
SEPARATOR = "/"
PART_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
MAX_PARTS = 16
MAX_ABSOLUTE_GATE = 1e4
PART_FIELDS = frozenset({"config", "gate", "name"})


@dataclass(frozen=True)
class CombinedPart:
    """One adapter among those that act together."""

    name: str
    gate: float
    config: AdapterConfig
    method: AdapterMethod

    @property
    def prefix(self) -> str:
        """What its tensors' names begin with."""
        return self.name + SEPARATOR

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[CombinedSource, ...]:
        """Its own sources, of the tensors that bear its name."""
        own = {
            name.removeprefix(self.prefix): replace(tensor, name=name.removeprefix(self.prefix))
            for name, tensor in tensors.items()
            if name.startswith(self.prefix)
        }
        with about_part(self.name):
            if not own:
                message = (
                    f"{WEIGHTS_FILE} has no tensors, whose names would begin with {self.prefix}; leave the part out."
                )
                raise InvalidAdapter(message, param=WEIGHTS_FILE)
            check_types(own, self.method.integer_parts)
            sources = self.method.sources(own, base)
            check_every_target_is_there(self.config, {source.site for source in sources}, base)
        return tuple(self._source(source) for source in sources)

    def _source(self, source: Source) -> CombinedSource:
        return CombinedSource(
            site=source.site,
            shapes={self.prefix + name: shape for name, shape in source.shapes.items()},
            num_rows=source.num_rows,
            num_row_values=source.num_row_values,
            num_vector_values=source.num_vector_values,
            num_virtual_tokens=source.num_virtual_tokens,
            is_dense=source.is_dense,
            reach_head=source.reach_head,
            source=source,
            part=self,
        )


@dataclass(frozen=True, kw_only=True)
class CombinedSource(Source):
    """A part's source, whose tensors bear the part's name and whose effect its gate multiplies."""

    source: Source
    part: CombinedPart

    def check(self, tensors: Tensors, base: BaseWeights) -> None:
        with about_part(self.part.name):
            self.source.check(PartTensors(tensors, self.part.prefix), base)

    def build(self, tensors: Tensors, base: BaseWeights) -> Part:
        with about_part(self.part.name):
            built = self.source.build(PartTensors(tensors, self.part.prefix), base)
        return _gated(built, self.part.gate) if isinstance(built, SiteUpdate) else built


@dataclass(frozen=True)
class PartTensors:
    """`source.Tensors` of one part, under the names that its method knows."""

    tensors: Tensors
    prefix: str

    def read(self, name: str) -> Floats:
        return self.tensors.read(self.prefix + name)

    def read_integers(self, name: str) -> NDArray[np.int64]:
        return self.tensors.read_integers(self.prefix + name)


@dataclass(frozen=True)
class Combined:
    """The parts of one combined adapter."""

    parts: tuple[CombinedPart, ...]
    refused_parts: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_config(cls, config: AdapterConfig, method_of: Callable[[AdapterConfig], AdapterMethod]) -> Combined:
        """`method_of` reads a part's config."""
        config.check_fields(read=frozenset({"parts"}), harmless=frozenset(), refused={})
        entries = config.fields.get("parts")
        if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_PARTS:
            config.refuse("parts", f"must be a list of 1 to {MAX_PARTS} objects, not {quoted(entries)}.")
        parts = tuple(_part(config, entry, method_of) for entry in entries)
        name, count = Counter(part.name for part in parts).most_common(1)[0]
        if count > 1:
            config.refuse("parts", f"has {count} parts named {quoted(name)}; give every part a name of its own.")
        if len({part.method.positions for part in parts}) > 1:
            config.refuse("parts", "change different tokens of a sequence, which one upload cannot; upload them apart.")
        return cls(parts)

    @property
    def label(self) -> str:
        return " + ".join(part.method.label for part in self.parts)

    @property
    def combination(self) -> Combination:
        kinds = {part.method.combination for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else "alone"

    @property
    def positions(self) -> Positions:
        return self.parts[0].method.positions

    @property
    def integer_parts(self) -> frozenset[str]:
        return frozenset(ending for part in self.parts for ending in part.method.integer_parts)

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {
            "parts": [
                {
                    "gate": part.gate,
                    "name": part.name,
                    "peft_type": part.config.text("peft_type"),
                    "scalars": dict(part.method.scalars),
                }
                for part in self.parts
            ]
        }

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[CombinedSource, ...]:
        """The parts' sources; at one site in the order of the parts."""
        sources = tuple(source for part in self.parts for source in part.sources(tensors, base))
        virtual = {source.part.name for source in sources if source.num_virtual_tokens}
        if len(virtual) > 1:
            _refuse(f"{listed(sorted(virtual))} each put tokens before the prompt; keep one of them.")
        claims = {(source.part.name, source.site) for source in sources if source.part.method.combination != "sum"}
        claims |= {(source.part.name, base.head or "") for source in sources if source.reach_head}
        site, count = max(Counter(site for _, site in claims).items(), key=lambda item: item[1], default=("", 0))
        if count > 1:
            names = sorted(name for name, claimed in claims if claimed == site)
            _refuse(f"{listed(names)} each do more than add at {site}, which only one may; upload them apart.")
        position = base.index()
        return tuple(sorted(sources, key=lambda source: position.get(source.site, -1)))


def _part(config: AdapterConfig, entry: Json, method_of: Callable[[AdapterConfig], AdapterMethod]) -> CombinedPart:
    if not isinstance(entry, dict) or not {"config", "name"} <= entry.keys() <= PART_FIELDS:
        config.refuse("parts", f"must hold objects with a name, a config and perhaps a gate, not {quoted(entry)}.")
    name, fields = entry["name"], entry["config"]
    if not isinstance(name, str) or PART_NAME.fullmatch(name) is None:
        config.refuse(
            "parts",
            f"has the name {quoted(name)}; names are 1 to 32 lower-case letters, digits, '-' and '_', and begin with a "
            "letter or digit.",
        )
    gate = AdapterConfig(entry).number("gate", default=1.0)
    if abs(gate) > MAX_ABSOLUTE_GATE:
        config.refuse("parts", f"has the gate {gate:g} for {quoted(name)}; at most {MAX_ABSOLUTE_GATE:g} is allowed.")
    with about_part(name):
        if not isinstance(fields, dict):
            config.refuse("config", f"must be an object, the {CONFIG_FILE} of the part, not {quoted(fields)}.")
        own = AdapterConfig(fields)
        if fields.get("peft_type") == PEFT_TYPE:
            own.refuse("peft_type", "is that of combined adapters, which do not nest; list its parts instead.")
        if fields.get("heddle_base_fingerprint") is not None:
            own.refuse("heddle_base_fingerprint", "is set; set it once, beside parts.")
        method = method_of(own)
        if gate != 1 and method.combination != "sum":
            own.refuse("gate", f"is {gate:g}, but {method.label} does more than add; leave it out, or set it to 1.")
    return CombinedPart(name, gate, own, method)


def _gated(update: SiteUpdate, gate: float) -> SiteUpdate:
    """The update with all that it adds multiplied."""
    if gate == 1:
        return update
    factor, rows = np.float32(gate), update.rows
    return replace(
        update,
        rows=None if rows is None else replace(rows, gain=factor * rows.gain),
        bias=None if update.bias is None else factor * update.bias,
        delta=None if update.delta is None else factor * update.delta,
    )


@contextmanager
def about_part(name: str) -> Iterator[None]:
    """Refusals from inside say which part they are about."""
    try:
        yield
    except InvalidAdapter as error:
        raise type(error)(f"In part {quoted(name)}: {error.message}", param=error.param) from error


def _refuse(problem: str) -> NoReturn:
    raise InvalidAdapter(f"{CONFIG_FILE}: parts {problem}", param=CONFIG_FILE)
