"""An adapter that fits a base: read, checked to the last tensor, and ready to be compiled.

It knows no method by name; what a file's tensors mean is the business of `method.METHODS`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.canonical import CompiledAdapter
from heddle_adapters.content import AdapterContent
from heddle_adapters.errors import MAX_MISMATCHES, AdapterIncompatible, InvalidAdapter, listed, quoted
from heddle_adapters.method import Combination, SiteSource
from heddle_adapters.module_pattern import path_endings
from heddle_adapters.tensor_file import WEIGHTS_FILE

VECTOR_BYTES = 4  # vectors are kept in float32


@dataclass(frozen=True)
class Checkpoint:
    """A validated adapter; only its shapes and scalars are in memory until `compile` reads the tensors."""

    content: AdapterContent
    sources: tuple[SiteSource, ...]

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
        """Paths of the changed modules, in the base's order."""
        return tuple(source.site for source in self.sources)

    @cached_property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.sources)

    @cached_property
    def max_rank(self) -> int:
        return max(source.num_rows for source in self.sources)

    @cached_property
    def num_row_values(self) -> int:
        """Numbers in the rows together."""
        return sum(source.num_rows * source.row_width for source in self.sources)

    @cached_property
    def num_vector_values(self) -> int:
        """Numbers in the vectors together."""
        return sum(source.vector_width for source in self.sources)

    @property
    def size_bytes(self) -> int:
        """Size of the weights file."""
        return self.content.file.size_bytes

    def estimate_bytes(self, row_dtype_bytes: int) -> int:
        """Pool bytes that the compiled rows and vectors take, without alignment and tables."""
        return pool_bytes(self.num_row_values, self.num_vector_values, row_dtype_bytes)

    def compile(self) -> CompiledAdapter:
        """The canonical form, in float32."""
        return CompiledAdapter(self.digest, tuple(source.build(self.content.file.read) for source in self.sources))


def pool_bytes(num_row_values: int, num_vector_values: int, row_dtype_bytes: int) -> int:
    """Bytes of rows and vectors, without alignment and tables."""
    return num_row_values * row_dtype_bytes + num_vector_values * VECTOR_BYTES


def read_checkpoint(config: bytes | Path, weights_path: Path, base: BaseLayout) -> Checkpoint:
    """Reads an adapter's two files against a base.

    Raises `InvalidAdapter` where the files are wrong in themselves, `AdapterIncompatible` where they do not fit `base`.
    """
    return fit_to_base(AdapterContent(config, weights_path), base)


def fit_to_base(content: AdapterContent, base: BaseLayout) -> Checkpoint:
    """Checks content against a base: its modules, its widths, every tensor consumed exactly once, all finite."""
    _check_fingerprint(content, base)
    sources = content.method.sources(content.file.tensors, base)
    _check_every_tensor_is_consumed(content, sources)
    _check_every_target_is_there(content, sources, base)
    _check_shapes(content, sources)
    _check_finite(content)
    return Checkpoint(content, sources)


def _check_fingerprint(content: AdapterContent, base: BaseLayout) -> None:
    wanted = content.config.text("heddle_base_fingerprint")
    if wanted is not None and wanted != base.fingerprint:
        raise AdapterIncompatible(
            f"{CONFIG_FILE}: heddle_base_fingerprint is {quoted(wanted)}, and this server's base, {base.model_name} "
            f"({base.quantization}), has {base.fingerprint}; upload it where the base it was trained on is served.",
            param=CONFIG_FILE,
        )


def _check_every_tensor_is_consumed(content: AdapterContent, sources: tuple[SiteSource, ...]) -> None:
    consumed = Counter(name for source in sources for name in source.shapes)
    wrong = [name for name in content.file.tensors if consumed[name] != 1]
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


def _check_every_target_is_there(content: AdapterContent, sources: tuple[SiteSource, ...], base: BaseLayout) -> None:
    """PEFT only warns about modules that the config promises and the file lacks; half an adapter is not served here.

    Skipped where the config picks modules in a way that would need a regular expression or PEFT's layer rules.
    """
    fields = content.config.fields
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or any(
        fields.get(rule) for rule in ("exclude_modules", "layers_to_transform", "layers_pattern")
    ):
        return
    present = {source.site for source in sources}
    names = {target for target in targets if isinstance(target, str)}
    promised = [site.path for site in base.sites if not names.isdisjoint(path_endings(site.path))]
    missing = [module for module in promised if module not in present]
    if missing:
        raise InvalidAdapter(
            f"{WEIGHTS_FILE} has nothing for modules that target_modules of {CONFIG_FILE} promises: {listed(missing)}; "
            "upload the whole file that was saved with this config.",
            param=WEIGHTS_FILE,
        )


def _check_shapes(content: AdapterContent, sources: tuple[SiteSource, ...]) -> None:
    tensors = content.file.tensors
    mismatches = [
        f"{name} must be {list(fitting)} and is {list(tensors[name].shape)}"
        for source in sources
        for name, fitting in source.shapes.items()
        if tensors[name].shape != fitting
    ]
    if mismatches:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE} does not fit this base: {listed(mismatches, MAX_MISMATCHES)}; "
            "upload it where the base it was trained on is served.",
            param=WEIGHTS_FILE,
        )


def _check_finite(content: AdapterContent) -> None:
    name = content.file.first_non_finite()
    if name is not None:
        message = (
            f"{WEIGHTS_FILE}: tensor {quoted(name)} holds NaN or infinite values; upload a sound training checkpoint."
        )
        raise InvalidAdapter(message, param=WEIGHTS_FILE)
