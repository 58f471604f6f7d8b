"""Packing: every row whole, aligned and bit for bit where the table says, and next to no page left unused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.canonical import CompiledAdapter, SiteUpdate
from heddle_adapters.packed_adapter import ABSENT, PackedAdapter
from heddle_adapters.packer import ALIGNMENT_BYTES, ROW_ENCODINGS, Packer
from row_samples import DIGEST, PAGE_BYTES, layout_of, normal, pack, random_rows, random_scales

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_WASTE = 0.05

SITES = (
    Site("narrow", "linear", 24, 40, has_bias=False),
    Site("odd", "linear", 13, 31, has_bias=True),  # rows that fill no whole 16 bytes
    Site("wide", "linear", 700, 90, has_bias=False),  # rows longer than a page
    Site("plain", "linear", 64, 64, has_bias=True),
)
LAYOUT = layout_of(*SITES)


def waste(packed: PackedAdapter) -> float:
    return 1 - packed.used_bytes / packed.size_bytes


def zero_rows(site: Site, rank: int) -> SiteUpdate:
    """Packing looks at shapes alone."""
    return SiteUpdate(
        site=site.path,
        a=np.zeros((rank, site.in_features), np.float32),
        b=np.zeros((rank, site.out_features), np.float32),
        gain=np.ones(rank, np.float32),
        c=np.zeros(rank, np.float32),
    )


def all_linears(num_layers: int, hidden: int, key_value: int, mlp: int) -> BaseLayout:
    """The seven linears of every layer of a Llama or Qwen2."""
    shapes = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden)]
    shapes += [(hidden, mlp), (hidden, mlp), (mlp, hidden)]
    return layout_of(
        *(
            Site(f"{n}.{i}", "linear", *shape, has_bias=False)
            for n in range(num_layers)
            for i, shape in enumerate(shapes)
        )
    )


@pytest.mark.parametrize("name", DTYPES)
def test_rows_are_rounded_as_torch_rounds_them(name: str) -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32)  # every kind of number
    bits[:1000] = (bits[:1000] & 0xFFFF0000) | 0x8000  # halfway between two bfloat16
    values = bits.view(np.float32)
    values = np.append(values[np.isfinite(values)], [np.inf, -np.inf, 0.0, -0.0, 65520.0, 3.4e38]).astype(np.float32)
    expected = torch.from_numpy(values).to(DTYPES[name])
    assert ROW_ENCODINGS[name](values).tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_every_row_and_vector_lies_where_the_table_says(name: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    updates = [random_rows(site, int(generator.integers(1, 40)), generator, has_bias=True) for site in SITES[:3]]
    updates.append(random_scales(SITES[3], generator, of_input=True))
    packed = pack(LAYOUT, DTYPES[name], updates)
    flat = torch.from_numpy(packed.pages.reshape(-1))
    taken = np.zeros(packed.size_bytes, bool)
    run_of_page = np.repeat(np.arange(len(packed.run_lengths)), packed.run_lengths)

    def check(offset: int, values: np.ndarray, dtype: torch.dtype) -> None:
        expected = torch.from_numpy(values).to(dtype)
        end = offset + expected.nbytes
        assert torch.equal(flat[offset:end].view(dtype), expected)
        assert offset % ALIGNMENT_BYTES == 0
        assert run_of_page[offset // PAGE_BYTES] == run_of_page[(end - 1) // PAGE_BYTES]
        is_long = expected.nbytes > PAGE_BYTES
        assert is_long or offset // PAGE_BYTES == (end - 1) // PAGE_BYTES, "a short row straddles pages"
        assert not taken[offset:end].any(), "two rows overlap"
        taken[offset:end] = True

    row = 0
    for number, update in enumerate(updates):
        assert packed.site[number] == number
        assert packed.count[number] == update.num_rows
        for a, b in zip(update.a, update.b, strict=True):
            check(int(packed.a_offset[row]), a, DTYPES[name])
            check(int(packed.b_offset[row]), b, DTYPES[name])
            row += 1
        for offsets, vector in zip(
            (packed.in_scale, packed.out_scale, packed.bias),
            (update.in_scale, update.out_scale, update.bias),
            strict=True,
        ):
            if vector is None:
                assert offsets[number] == ABSENT
            else:
                check(int(offsets[number]), vector, torch.float32)
    assert row == packed.num_rows
    assert taken.sum() == packed.used_bytes
    assert not packed.pages.reshape(-1)[~taken].any(), "what nothing lies in is zero"
    assert packed.run_lengths.sum() == packed.num_pages
    np.testing.assert_array_equal(packed.gain, np.concatenate([update.gain for update in updates]))
    np.testing.assert_array_equal(packed.c, np.concatenate([update.c for update in updates]))


def test_rows_of_a_site_lie_one_after_another_up_to_page_ends() -> None:
    site = SITES[0]
    packed = pack(LAYOUT, torch.float32, [random_rows(site, 50, np.random.default_rng(1))])
    for offsets, width in ((packed.a_offset, site.in_features), (packed.b_offset, site.out_features)):
        steps = np.diff(offsets)
        is_new_page = np.diff(offsets // PAGE_BYTES) > 0
        assert (steps[~is_new_page] == -(-width * 4 // ALIGNMENT_BYTES) * ALIGNMENT_BYTES).all()
        assert (offsets[1:][is_new_page] % PAGE_BYTES == 0).all()


def test_pages_that_long_rows_leave_half_empty_are_filled() -> None:
    """A row of 2,800 bytes leaves 272 of its sixth page, into which the site before it goes with 96 + 160 bytes."""
    generator = np.random.default_rng(2)
    packed = pack(LAYOUT, torch.float32, [random_rows(SITES[0], 1, generator), random_rows(SITES[2], 4, generator)])
    assert packed.run_lengths.tolist() == [6, 6, 6, 6, 1, 1, 1, 1], "of the long rows, and of the 360 bytes of each b"
    assert packed.a_offset[0] == 2800
    assert packed.b_offset[0] == 2800 + 96


@pytest.mark.parametrize("rank", [8, 16, 64, "mixed"])
@pytest.mark.parametrize("base", ["qwen2-0.5b", "demo"])
def test_waste_is_small(base: str, rank: int | str) -> None:
    """On all linears of a base, in bfloat16, with pages of 16 tokens of its keys and values."""
    layers, hidden, key_value, mlp = {"qwen2-0.5b": (24, 896, 128, 4864), "demo": (6, 256, 128, 640)}[base]
    layout = all_linears(layers, hidden, key_value, mlp)
    packer = Packer(layout, "bfloat16", layers * 2 * 16 * key_value * 2, {})
    rank_of: Callable[[int], int] = lambda number: (8, 64, 16, 12, 32)[number % 5] if rank == "mixed" else int(rank)  # noqa: E731
    updates = tuple(zero_rows(site, rank_of(number)) for number, site in enumerate(layout.sites))
    packed = packer.pack(CompiledAdapter(DIGEST, updates))
    assert packed.used_bytes == sum(2 * (update.a.size + update.b.size) for update in updates)
    assert waste(packed) <= MAX_WASTE


def test_scaling_a_whole_layer_scales_the_base_bias_with_it() -> None:
    """(l - 1) * b0 where the base has a bias, beside a bias that the adapter brings; nothing where it has none."""
    generator = np.random.default_rng(4)
    with_bias, without = SITES[3], SITES[0]
    b0, own = normal(generator, 64), normal(generator, 64)
    scale = random_scales(with_bias, generator, of_input=False)
    assert scale.out_scale is not None
    folded = (scale.out_scale - 1) * b0
    for update, expected in (
        (scale, folded),
        (replace(scale, bias=own), own + folded),
        (replace(scale, bias=own, scales_base_bias=False), own),
        (replace(scale, scales_base_bias=False), None),
        (random_scales(without, generator, of_input=False), None),
    ):
        packed = pack(LAYOUT, torch.bfloat16, [update], base_bias={with_bias.path: b0})
        begin = int(packed.bias[0])
        if expected is None:
            assert begin == ABSENT
        else:
            np.testing.assert_array_equal(packed.pages.reshape(-1)[begin : begin + 256].view(np.float32), expected)
