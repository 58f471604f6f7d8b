"""Packing: every row whole, aligned and bit for bit where the table says, and next to no page left unused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from heddle_adapters.base_layout import BaseLayout, KvLayout, Site
from heddle_adapters.canonical import CompiledAdapter, Floats, Rows, SiteUpdate
from heddle_adapters.packed_adapter import ABSENT, PackedAdapter
from heddle_adapters.packer import ALIGNMENT_BYTES, ROW_ENCODINGS, Packer
from heddle_adapters.positions import Positions
from row_samples import (
    DIGEST,
    PAGE_BYTES,
    layout_of,
    normal,
    pack,
    random_prefix,
    random_rows,
    random_scales,
    random_tokens,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_WASTE = 0.05

SITES = (
    Site("narrow", "linear", 24, 40, has_bias=False),
    Site("odd", "linear", 13, 31, has_bias=True),  # rows that fill no whole 16 bytes
    Site("wide", "linear", 700, 90, has_bias=False),  # rows longer than a page
    Site("plain", "linear", 64, 64, has_bias=True),
)
LAYOUT = layout_of(*SITES)
KV = KvLayout(num_layers=4, num_kv_heads=2, head_dim=4)
WITH_KV = msgspec.structs.replace(LAYOUT, kv=KV)


@dataclass
class Pages:
    """An adapter's pages, and which of their bytes have been found to hold something."""

    packed: PackedAdapter
    taken: NDArray[np.bool_]  # [size_bytes]

    @classmethod
    def of(cls, packed: PackedAdapter) -> Pages:
        """Keys and values of its own fill their pages whole."""
        taken = np.zeros(packed.size_bytes, np.bool_)
        taken[: packed.num_prefix_pages * PAGE_BYTES] = True
        return cls(packed, taken)

    def check(self, offset: int, values: Floats, dtype: torch.dtype) -> None:
        """One row or vector lies there: bit for bit, aligned, within one run, and nothing else with it."""
        expected = torch.from_numpy(values).to(dtype)
        end = offset + expected.nbytes
        run_of_page = np.repeat(np.arange(len(self.packed.run_lengths)), self.packed.run_lengths)
        flat = torch.from_numpy(self.packed.pages.reshape(-1))
        assert torch.equal(flat[offset:end].view(dtype), expected)
        assert offset % ALIGNMENT_BYTES == 0
        assert run_of_page[offset // PAGE_BYTES] == run_of_page[(end - 1) // PAGE_BYTES]
        is_long = expected.nbytes > PAGE_BYTES
        assert is_long or offset // PAGE_BYTES == (end - 1) // PAGE_BYTES, "a short row straddles pages"
        assert not self.taken[offset:end].any(), "two rows overlap"
        self.taken[offset:end] = True

    def check_rest(self) -> None:
        """What nothing was found in is zero."""
        assert not self.packed.pages.reshape(-1)[~self.taken].any()
        assert self.packed.run_lengths.sum() == self.packed.num_pages


def waste(packed: PackedAdapter) -> float:
    return 1 - packed.used_bytes / packed.size_bytes


def zero_rows(site: Site, rank: int) -> SiteUpdate:
    """Packing looks at shapes alone."""
    a, b = np.zeros((rank, site.in_features), np.float32), np.zeros((rank, site.out_features), np.float32)
    return SiteUpdate(site.path, Rows.of(a, b))


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
    pages = Pages.of(packed)
    row = 0
    for number, update in enumerate(updates):
        assert packed.site[number] == number
        assert packed.count[number] == update.num_rows
        for a, b in zip(update.rows.a, update.rows.b, strict=True) if update.rows is not None else ():
            pages.check(int(packed.a_offset[row]), a, DTYPES[name])
            pages.check(int(packed.b_offset[row]), b, DTYPES[name])
            row += 1
        for offsets, vector in zip(
            (packed.in_scale, packed.out_scale, packed.bias),
            (update.in_scale, update.out_scale, update.bias),
            strict=True,
        ):
            if vector is None:
                assert offsets[number] == ABSENT
            else:
                pages.check(int(offsets[number]), vector, torch.float32)
    assert row == packed.num_rows
    assert pages.taken.sum() == packed.used_bytes
    pages.check_rest()
    assert (len(packed.delta_site), len(packed.delta_offset), len(packed.token_id), len(packed.token_offset)) == (
        0,
    ) * 4
    assert (packed.num_prefix_tokens, packed.num_prefix_pages, packed.tokens_reach_head) == (0, 0, False)
    assert packed.positions.are_all
    rows = [update.rows for update in updates if update.rows is not None]
    assert len(rows) == 3
    np.testing.assert_array_equal(packed.gain, np.concatenate([each.gain for each in rows]))
    np.testing.assert_array_equal(packed.c, np.concatenate([each.c for each in rows]))


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
    rows = [update.rows for update in updates if update.rows is not None]
    assert packed.used_bytes == sum(2 * (each.a.size + each.b.size) for each in rows)
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


# What an adapter brings beside rows and vectors.


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_deltas_lie_row_by_row_beside_rows_and_vectors(name: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    narrow, odd, wide, plain = SITES
    updates = [
        replace(random_rows(wide, 0, generator), delta=normal(generator, wide.out_features, wide.in_features)),
        random_rows(narrow, 5, generator),
        replace(
            random_rows(odd, 3, generator, has_bias=True), delta=normal(generator, odd.out_features, odd.in_features)
        ),
        random_scales(plain, generator, of_input=False),
    ]
    packed = pack(LAYOUT, DTYPES[name], updates)
    pages = Pages.of(packed)
    assert packed.site.tolist() == [2, 0, 1, 3]
    assert packed.count.tolist() == [0, 5, 3, 0]
    assert packed.delta_site.tolist() == [2, 1]
    deltas = [row for update in updates if update.delta is not None for row in update.delta]
    assert len(packed.delta_offset) == len(deltas) == wide.out_features + odd.out_features
    for offset, values in zip(packed.delta_offset.tolist(), deltas, strict=True):
        pages.check(offset, values, DTYPES[name])
    rows = [update.rows for update in updates if update.rows is not None]
    for offsets, parts in ((packed.a_offset, [each.a for each in rows]), (packed.b_offset, [each.b for each in rows])):
        listed = [row for part in parts for row in part]
        for offset, values in zip(offsets.tolist(), listed, strict=True):
            pages.check(offset, values, DTYPES[name])
    bias, out_scale = updates[2].bias, updates[3].out_scale
    assert bias is not None
    assert out_scale is not None
    pages.check(int(packed.bias[2]), bias, torch.float32)
    pages.check(int(packed.out_scale[3]), out_scale, torch.float32)
    assert pages.taken.sum() == packed.used_bytes
    pages.check_rest()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("width", [24, 700])
@pytest.mark.parametrize("reach_head", [False, True])
def test_rows_of_tokens_lie_where_the_table_says(reach_head: bool, width: int, name: str) -> None:
    """Short ones and ones longer than a page; the adapter may have nothing else."""
    generator = np.random.default_rng(6)
    tokens = random_tokens(generator, [0, 3, 17, 100, 128, 129], width, reach_head)
    for updates in ([], [random_rows(SITES[1], 4, generator)]):
        packed = pack(LAYOUT, DTYPES[name], updates, tokens=tokens)
        assert packed.token_id.tolist() == [0, 3, 17, 100, 128, 129]
        assert packed.tokens_reach_head == reach_head
        pages = Pages.of(packed)
        for offset, values in zip(packed.token_offset.tolist(), tokens.values, strict=True):
            pages.check(offset, values, DTYPES[name])
        for offsets, part in ((packed.a_offset, "a"), (packed.b_offset, "b")):
            rows = [row for each in updates if each.rows is not None for row in getattr(each.rows, part)]
            for offset, values in zip(offsets.tolist(), rows, strict=True):
                pages.check(offset, values, DTYPES[name])
        assert pages.taken.sum() == packed.used_bytes
        pages.check_rest()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 8, 13])
def test_a_prefix_lies_in_the_first_pages_as_a_sequence_does(num_tokens: int, name: str) -> None:
    """[num_layers, 2, page_tokens, num_kv_heads, head_dim] a page, and zeros behind the last token."""
    dtype = DTYPES[name]
    prefix = random_prefix(np.random.default_rng(num_tokens), KV, num_tokens)
    packed = pack(WITH_KV, dtype, [], prefix=prefix)
    page_tokens = PAGE_BYTES // (KV.num_layers * 2 * KV.num_kv_heads * KV.head_dim * dtype.itemsize)
    assert page_tokens == {4: 2, 2: 4}[dtype.itemsize]
    num_pages = -(-num_tokens // page_tokens)
    expected = torch.zeros(num_pages, KV.num_layers, 2, page_tokens, KV.num_kv_heads, KV.head_dim, dtype=dtype)
    for token in range(num_tokens):
        page, place = divmod(token, page_tokens)
        for layer in range(KV.num_layers):
            for head in range(KV.num_kv_heads):
                expected[page, layer, 0, place, head] = torch.from_numpy(prefix.keys[layer, token, head])
                expected[page, layer, 1, place, head] = torch.from_numpy(prefix.values[layer, token, head])
    assert torch.equal(torch.from_numpy(packed.pages).view(dtype), expected.view(num_pages, -1))
    assert (packed.num_prefix_tokens, packed.num_prefix_pages) == (num_tokens, num_pages)
    assert packed.run_lengths.tolist() == [1] * num_pages
    assert packed.used_bytes == prefix.keys.size * 2 * dtype.itemsize


@pytest.mark.parametrize("name", DTYPES)
def test_everything_at_once_lies_behind_the_prefix(name: str) -> None:
    """Offsets count from the first page, those of the prefix included."""
    generator = np.random.default_rng(8)
    dtype, (narrow, _, wide, plain) = DTYPES[name], SITES
    prefix = random_prefix(generator, KV, 7)
    tokens = random_tokens(generator, [1, 5, 128], plain.in_features, reach_head=False)
    positions = Positions(num_first=2, num_last=3)
    updates = [
        random_rows(wide, 2, generator, has_bias=True),
        replace(random_rows(narrow, 6, generator), delta=normal(generator, narrow.out_features, narrow.in_features)),
        random_scales(plain, generator, of_input=True),
    ]
    alone = pack(WITH_KV, dtype, [], prefix=prefix)
    without = pack(WITH_KV, dtype, updates, tokens=tokens)
    packed = pack(WITH_KV, dtype, updates, tokens=tokens, prefix=prefix, positions=positions)
    assert packed.positions == positions
    np.testing.assert_array_equal(packed.pages[: alone.num_pages], alone.pages)
    np.testing.assert_array_equal(packed.pages[alone.num_pages :], without.pages)
    np.testing.assert_array_equal(packed.run_lengths, np.concatenate([alone.run_lengths, without.run_lengths]))
    assert packed.used_bytes == alone.used_bytes + without.used_bytes
    assert packed.num_prefix_pages == alone.num_pages > 1
    for column in ("in_scale", "out_scale", "bias", "a_offset", "b_offset", "delta_offset", "token_offset"):
        moved, unmoved = getattr(packed, column), getattr(without, column)
        assert len(moved) == len(unmoved) > 0
        np.testing.assert_array_equal(moved, np.where(unmoved == ABSENT, ABSENT, unmoved + alone.size_bytes), column)


def test_rows_of_which_there_are_none_take_nothing() -> None:
    none = Rows.of(np.zeros((0, 24), np.float32), np.zeros((0, 40), np.float32))
    packed = pack(LAYOUT, torch.float32, [SiteUpdate("narrow", none, bias=np.ones(40, np.float32))])
    assert (packed.num_rows, packed.count.tolist(), packed.num_pages, packed.used_bytes) == (0, [0], 1, 160)
