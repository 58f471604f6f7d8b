"""An adapter that fits a base: read, checked to the last tensor, and ready to be compiled.

It knows no method by name; what a file's tensors mean is the business of `method.METHODS`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.agreement import check_every_target_is_there, check_fingerprint, check_types
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.canonical import CompiledAdapter, Part
from heddle_adapters.content import AdapterContent
from heddle_adapters.errors import MAX_MISMATCHES, AdapterIncompatible, InvalidAdapter, listed, quoted
from heddle_adapters.method import Combination
from heddle_adapters.positions import Positions
from heddle_adapters.source import BaseWeights, Source, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE

VECTOR_BYTES = 4  # vectors are kept in float32
MAX_COMPARED_BYTES = 64 << 20  # of a file whose tensors are compared with the base's already at its upload
PREFIX_SITE = "keys and values of every layer"  # what people are told of a prefix, which has no module


@dataclass(frozen=True)
class Checkpoint:
    """A validated adapter; only its shapes and scalars are in memory until `compile` reads the tensors."""

    content: AdapterContent
    sources: tuple[Source, ...]

    @property
    def digest(self) -> str:
        """Identity of this version, "sha256:<hex>"; the first use reads the whole file."""
        return self.content.digest

    @property
    def method(self) -> str:
        """The method's name for people."""
        return self.content.method.label

    @property
    def combination(self) -> Combination:
        """How it takes part in a mix."""
        return self.content.method.combination

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the changed modules, each once."""
        return tuple(dict.fromkeys(source.site for source in self.sources if source.site))

    @cached_property
    def sites_by_pattern(self) -> tuple[tuple[str, int], ...]:
        """What it changes, for people: module paths with every number as "*", and how many modules have that path."""
        return tuple(Counter(map(_pattern, dict.fromkeys(source.site for source in self.sources))).items())

    @cached_property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.sources)

    @cached_property
    def max_rank(self) -> int:
        return max(source.num_rows for source in self.sources)

    @cached_property
    def num_row_values(self) -> int:
        """Numbers that are kept in the compute dtype."""
        return sum(source.num_row_values for source in self.sources)

    @cached_property
    def num_vector_values(self) -> int:
        """Numbers in the vectors together."""
        return sum(source.num_vector_values for source in self.sources)

    @cached_property
    def num_virtual_tokens(self) -> int:
        """Tokens that it puts before every prompt."""
        return sum(source.num_virtual_tokens for source in self.sources)

    @cached_property
    def num_prefix_tokens(self) -> int:
        """Of those, the ones whose keys and values it brings."""
        return sum(source.num_virtual_tokens for source in self.sources if not source.site)

    @property
    def is_dense(self) -> bool:
        """Whether it takes the memory of whole weights of the base."""
        return any(source.is_dense for source in self.sources)

    @property
    def positions(self) -> Positions:
        """Which tokens of a sequence it changes."""
        return self.content.method.positions

    @property
    def size_bytes(self) -> int:
        """Size of the weights file."""
        return self.content.file.size_bytes

    def estimate_bytes(self, row_dtype_bytes: int) -> int:
        """Pool bytes that the compiled rows and vectors take, without alignment and tables."""
        return pool_bytes(self.num_row_values, self.num_vector_values, row_dtype_bytes)

    def compile(self, base: BaseWeights) -> CompiledAdapter:
        """The canonical form, in float32. Raises `AdapterError` for what only the numbers show."""
        for source in self.sources:
            source.check(self.content.file, base)
        with np.errstate(all="ignore"):  # what becomes infinite or undefined is refused below
            parts = [_built(source, self.content.file, base) for source in self.sources]
        for source, part in zip(self.sources, parts, strict=True):
            _check_folded(source, part)
        return CompiledAdapter.of(self.digest, parts, self.positions)


def pool_bytes(num_row_values: int, num_vector_values: int, row_dtype_bytes: int) -> int:
    """Bytes of rows and vectors, without alignment and tables."""
    return num_row_values * row_dtype_bytes + num_vector_values * VECTOR_BYTES


def _pattern(site: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in site.split(".")) or PREFIX_SITE


def read_checkpoint(
    config: bytes | Path, weights_path: Path, base: BaseLayout, weights: BaseWeights | None = None
) -> Checkpoint:
    """Reads an adapter's two files against a base, and against its numbers where they are at hand.

    Raises `InvalidAdapter` where the files are wrong in themselves, `AdapterIncompatible` where they do not fit `base`.
    """
    return fit_to_base(AdapterContent(config, weights_path), base, weights)


def fit_to_base(content: AdapterContent, base: BaseLayout, weights: BaseWeights | None = None) -> Checkpoint:
    """Checks content against a base: its modules, its widths, every tensor consumed exactly once, all finite.

    With the base's numbers also what needs them, unless the file is so large that comparing takes much memory: that,
    and all of it without them, is left to `Checkpoint.compile`.
    """
    check_fingerprint(content.config, base)
    check_types(content.file.tensors, content.method.integer_parts)
    sources = tuple(content.method.sources(content.file.tensors, base))
    _check_every_tensor_is_consumed(content, sources)
    check_every_target_is_there(content.config, {source.site for source in sources}, base)
    _check_shapes(content, sources)
    _check_is_allowed(content, sources, base)
    _check_finite(content)
    if weights is not None and content.file.size_bytes <= MAX_COMPARED_BYTES:
        for source in sources:
            source.check(content.file, weights)
    return Checkpoint(content, sources)


def _check_every_tensor_is_consumed(content: AdapterContent, sources: tuple[Source, ...]) -> None:
    consumed = {name for source in sources for name in source.shapes}
    wrong = [name for name in content.file.tensors if name not in consumed]
    if wrong:
        reasons = {_reason(content, name) for name in wrong}
        raise InvalidAdapter(
            f"{WEIGHTS_FILE} has {len(wrong)} tensors that are not part of a {content.method.label} adapter: "
            f"{listed([quoted(name) for name in wrong])}; {listed(sorted(reasons))}.",
            param=WEIGHTS_FILE,
        )


def _reason(content: AdapterContent, name: str) -> str:
    """What to say about a tensor that nothing consumed."""
    if ".base_layer." in name:
        return "the base's own tensors cannot be uploaded: save_pretrained(save_embedding_layers=False) leaves them out"
    reasons = (reason for part, reason in content.method.refused_parts.items() if name.endswith("." + part))
    return next(reasons, "remove them, or save the adapter again with PEFT")


def _check_shapes(content: AdapterContent, sources: tuple[Source, ...]) -> None:
    tensors = content.file.tensors
    mismatches = [
        f"{name} must be {list(fitting)} and is {list(tensors[name].shape)}"
        for name, fitting in {name: fitting for source in sources for name, fitting in source.shapes.items()}.items()
        if tensors[name].shape != fitting
    ]
    if mismatches:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE} does not fit this base: {listed(mismatches, MAX_MISMATCHES)}; "
            "upload it where the base it was trained on is served.",
            param=WEIGHTS_FILE,
        )


def _check_is_allowed(content: AdapterContent, sources: tuple[Source, ...], base: BaseLayout) -> None:
    if not base.allows_dense and (dense := [source.site for source in sources if source.is_dense]):
        raise InvalidAdapter(
            f"{content.method.label} takes as much memory as the base's own weights at {len(dense)} modules "
            f"({listed(dense, MAX_MISMATCHES)}), and this server does not take such adapters; its operator can allow "
            "them with --allow-dense-adapters.",
            param=CONFIG_FILE,
        )


def _built(source: Source, tensors: Tensors, base: BaseWeights) -> Part:
    try:
        return source.build(tensors, base)
    except np.linalg.LinAlgError as error:
        message = (
            f"{WEIGHTS_FILE}: the tensors for {source.site} cannot be computed with ({error}); upload a sound training "
            "checkpoint."
        )
        raise InvalidAdapter(message, param=WEIGHTS_FILE) from error


def _check_folded(source: Source, part: Part) -> None:
    """Finite tensors may still multiply to what no float32 holds."""
    if not all(np.isfinite(array).all() for array in part.arrays()):
        message = (
            f"{WEIGHTS_FILE}: what the tensors for {source.site or 'the prefix'} come to is infinite or undefined in "
            "float32; upload a sound training checkpoint."
        )
        raise InvalidAdapter(message, param=WEIGHTS_FILE)


def _check_finite(content: AdapterContent) -> None:
    name = content.file.first_non_finite()
    if name is not None:
        message = (
            f"{WEIGHTS_FILE}: tensor {quoted(name)} holds NaN or infinite values; upload a sound training checkpoint."
        )
        raise InvalidAdapter(message, param=WEIGHTS_FILE)
