"""FourierFT and C3A: weights given by few numbers, through a Fourier transform.

FourierFT: `y += scaling * Re(ifft2(S)) x` with S zero but for `n_frequency` elements. Format: PEFT's
`tuners/fourierft`, files of peft 0.21: per targeted module `fourierft_spectrum` [n_frequency]. Where these stand is not
in the file: at the first numbers of `torch.randperm(out_features * in_features)` with a generator of
`random_loc_seed`, counted through S row by row.

C3A: `y += C x / in_features` with C of circulant blocks, in each of which row k is row 0 shifted by k. Format: PEFT's
`tuners/c3a`: per targeted module `c3a_kernel` [out_features / b, in_features / b, b], the blocks' first rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import SiteUpdate
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.methods.companion_refusals import MODULES_TO_SAVE, refuse_trained_biases
from heddle_adapters.methods.dense_delta import DenseMethod, DenseSource, refuse_shape
from heddle_adapters.methods.torch_permutation import MAX_LENGTH, MAX_SEED, permutation_head
from heddle_adapters.site_tensors import SiteTensors, by_site
from heddle_adapters.source import BaseWeights, Tensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

SPECTRUM, KERNEL = "fourierft_spectrum", "c3a_kernel"
MAX_FREQUENCIES = 2**20  # per module: finding their places takes a second; the method is meant for thousands
MAX_ABSOLUTE_SCALING = 1e6

FOURIER_READ_FIELDS = frozenset({"bias", "n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"})
FOURIER_HARMLESS_FIELDS = frozenset({"fan_in_fan_out", "init_weights"})
C3A_READ_FIELDS = frozenset({"bias", "block_size", "block_size_pattern"})
C3A_HARMLESS_FIELDS = frozenset({"init_weights"})


@dataclass(frozen=True, kw_only=True)
class FourierSource(DenseSource):
    """One site's spectrum in the file."""

    name: str
    shape: tuple[int, int]  # [out_features, in_features]
    scaling: float
    seed: int

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        values = tensors.read(self.name)
        spectrum = np.zeros(self.shape, np.float32)
        spectrum.reshape(-1)[permutation_head(spectrum.size, len(values), self.seed)] = values
        return SiteUpdate(self.site, delta=(np.fft.ifft2(spectrum).real * self.scaling).astype(np.float32))


@dataclass(frozen=True)
class Fourier(DenseMethod):
    """The settings of one FourierFT adapter."""

    counts: frozenset[float]  # numbers of frequencies that the config gives to modules
    scaling: float
    seed: int
    label: ClassVar[str] = "FourierFT"

    @classmethod
    def from_config(cls, config: AdapterConfig) -> Fourier:
        config.check_fields(read=FOURIER_READ_FIELDS, harmless=FOURIER_HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        count, pattern = config.rank("n_frequency", default=1000), config.rank_pattern("n_frequency_pattern")
        scaling = config.number("scaling", default=150)
        if abs(scaling) > MAX_ABSOLUTE_SCALING:
            config.refuse("scaling", f"is {scaling:g}; at most {MAX_ABSOLUTE_SCALING:g} is allowed.")
        seed = config.fields.get("random_loc_seed", 777)
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            config.refuse("random_loc_seed", f"must be a whole number from 0 to {MAX_SEED}.")
        return cls(frozenset({count, *pattern.values.values()}), scaling, seed)

    @property
    def scalars(self) -> Mapping[str, Json]:
        return {"scaling": self.scaling, "seed": self.seed}

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[FourierSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), (SPECTRUM,), base))

    def _source(self, found: SiteTensors) -> FourierSource:
        site, spectrum = found.site, found.require(SPECTRUM)
        num_weights = site.out_features * site.in_features
        if len(spectrum.shape) != 1 or spectrum.shape[0] not in self.counts:
            fields = "n_frequency or n_frequency_pattern"
            refuse_shape(SPECTRUM, spectrum, site.path, fields, f"gives modules {_listed(self.counts)} frequencies")
        limit = min(num_weights, MAX_FREQUENCIES)
        if spectrum.shape[0] > limit:
            refuse_shape(SPECTRUM, spectrum, site.path, "n_frequency", f"may be at most {limit} there")
        if num_weights > MAX_LENGTH:
            raise InvalidAdapter(
                f"{WEIGHTS_FILE} changes {site.path}, which has {num_weights} weights; FourierFT is served up to "
                f"{MAX_LENGTH}, beyond which the places that a seed means are not known. Leave the module out.",
                param=WEIGHTS_FILE,
            )
        return FourierSource(
            site=site.path,
            shapes={spectrum.name: spectrum.shape},
            num_row_values=num_weights,
            name=spectrum.name,
            shape=(site.out_features, site.in_features),
            scaling=self.scaling,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class CirculantSource(DenseSource):
    """One site's kernel in the file."""

    name: str

    def build(self, tensors: Tensors, base: BaseWeights) -> SiteUpdate:
        kernel = tensors.read(self.name)
        num_out, num_in, block_size = kernel.shape
        shifts = np.arange(block_size)
        blocks = kernel[:, :, (shifts[None, :] - shifts[:, None]) % block_size]  # [num_out, num_in, row, column]
        circulant = blocks.transpose(0, 2, 1, 3).reshape(num_out * block_size, num_in * block_size)
        return SiteUpdate(self.site, delta=circulant / np.float32(num_in * block_size))


@dataclass(frozen=True)
class Circulant(DenseMethod):
    """The settings of one C3A adapter."""

    block_sizes: frozenset[float]  # that the config gives to modules
    label: ClassVar[str] = "C3A"
    scalars: ClassVar[Mapping[str, Json]] = {}

    @classmethod
    def from_config(cls, config: AdapterConfig) -> Circulant:
        config.check_fields(read=C3A_READ_FIELDS, harmless=C3A_HARMLESS_FIELDS, refused=MODULES_TO_SAVE)
        refuse_trained_biases(config)
        block_size, pattern = config.rank("block_size", default=256), config.rank_pattern("block_size_pattern")
        return cls(frozenset({block_size, *pattern.values.values()}))

    def sources(self, tensors: Mapping[str, TensorInfo], base: BaseLayout) -> tuple[CirculantSource, ...]:
        return tuple(self._source(found) for found in by_site(tensors.values(), (KERNEL,), base))

    def _source(self, found: SiteTensors) -> CirculantSource:
        site, kernel = found.site, found.require(KERNEL)
        fields = "block_size or block_size_pattern"
        if len(kernel.shape) != 3 or kernel.shape[2] not in self.block_sizes:
            refuse_shape(KERNEL, kernel, site.path, fields, f"gives modules blocks of {_listed(self.block_sizes)}")
        block_size = kernel.shape[2]
        if site.out_features % block_size or site.in_features % block_size:
            widths = f"must divide {site.out_features} and {site.in_features}"
            refuse_shape(KERNEL, kernel, site.path, fields, widths)
        return CirculantSource(
            site=site.path,
            shapes={kernel.name: (site.out_features // block_size, site.in_features // block_size, block_size)},
            num_row_values=site.out_features * site.in_features,
            name=kernel.name,
        )


def _listed(numbers: frozenset[float]) -> str:
    return " or ".join(f"{number:g}" for number in sorted(numbers)[:5])
