"""What an adapter that does not exist yet would take: pages, by the packer's own arithmetic, and bytes as a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heddle_adapters.base_layout import Site
from heddle_adapters.packer import ELEMENT_BYTES, PageSpace

TYPICAL_RANK = 16  # of the adapter by which a pool's size is told
FILE_ELEMENT_BYTES = 4  # PEFT saves adapters in float32 unless they were trained in something else


@dataclass(frozen=True)
class AdapterFootprint:
    """A LoRA of one rank at some linears of a base."""

    num_pages: int
    file_bytes: int  # its tensors in float32, without the file's header


def footprint(sites: Sequence[Site], rank: int, dtype: str, page_bytes: int) -> AdapterFootprint:
    """`dtype` that the server computes in, a key of ELEMENT_BYTES: rows lie in the pool in it."""
    element_bytes = ELEMENT_BYTES[dtype]
    space = PageSpace(page_bytes)
    space.place([(rank, width * element_bytes) for site in sites for width in (site.in_features, site.out_features)])
    num_weights = sum(rank * (site.in_features + site.out_features) for site in sites)
    return AdapterFootprint(sum(space.run_lengths), num_weights * FILE_ELEMENT_BYTES)


def all_linears(sites: Sequence[Site], vocabulary_size: int) -> tuple[Site, ...]:
    """Those that PEFT's "all-linear" means: not the output layer."""
    return tuple(site for site in sites if site.kind == "linear" and site.out_features != vocabulary_size)
