"""The attention kernels against dense float64 attention, and the machine code they compile to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heddle_kernels.paged_batch import PagedBatch
from tolerances import OPERATION
from triton_aot import AotKernel, compile_all

pytest.importorskip("triton")
from heddle_kernels.triton_kernels import attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_LAYERS = 2  # in the pool; the kernels see the second one, a view with gaps


@dataclass(frozen=True)
class Layer:
    """What one layer's attention depends on beside its tokens."""

    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    dtype: torch.dtype = torch.float32
    page_tokens: int = 4

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def scaling(self) -> float:
        return 1.2 / math.sqrt(self.head_dim)


class World:
    """Sequences with random states, and a pool of pages full of NaN to put them into."""

    def __init__(self, layer: Layer, lengths: list[int], seed: int = 0) -> None:
        self.layer, self.lengths = layer, lengths
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(layer.dtype).to(DEVICE)

        self.sinks = normal(layer.num_heads) if layer.has_sinks else None
        self.query = [normal(length, layer.num_heads, layer.head_dim) for length in lengths]
        self.key = [normal(length, layer.num_kv_heads, layer.head_dim) for length in lengths]
        self.value = [normal(length, layer.num_kv_heads, layer.head_dim) for length in lengths]
        counts = [-(-length // layer.page_tokens) for length in lengths]
        shape = (sum(counts) + 3, NUM_LAYERS, 2, layer.page_tokens, layer.num_kv_heads, layer.head_dim)
        self.pool = torch.full(shape, torch.nan, dtype=layer.dtype, device=DEVICE)
        order = torch.randperm(shape[0], generator=generator).tolist()
        self.pages = [order[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]

    @property
    def kv(self) -> Tensor:
        return self.pool[:, 1]

    def batch(self, chunks: dict[int, tuple[int, int]], padding: int = 0) -> PagedBatch:
        """New tokens begin .. end - 1 by sequence; then `padding` single tokens of sequences of length 0."""
        size = self.layer.page_tokens
        bounds = [0, *accumulate([end - begin for begin, end in chunks.values()] + [1] * padding)]
        lengths = [end for _, end in chunks.values()] + [0] * padding
        table = torch.zeros(len(lengths), max(map(len, self.pages)), dtype=torch.int32)
        slots = list[int]()
        for line, (number, (begin, end)) in zip(table, chunks.items(), strict=False):
            held = self.pages[number][: -(-end // size)]
            line[: len(held)] = torch.tensor(held)
            slots += [held[position // size] * size + position % size for position in range(begin, end)]
        return PagedBatch(
            query_start=torch.tensor(bounds, dtype=torch.int32, device=DEVICE),
            length=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
            page_table=table.to(DEVICE),
            write_slot=torch.tensor(slots, device=DEVICE),
            query_bounds=tuple(bounds),
            lengths=tuple(lengths),
        )

    def step(self, chunks: dict[int, tuple[int, int]], padding: int = 0) -> list[Tensor]:
        """Write the chunks' keys and values, attend; what each chunk got, then what the padding got."""
        batch = self.batch(chunks, padding)
        query, key, value = (
            torch.cat([states[number][begin:end] for number, (begin, end) in chunks.items()])
            for states in (self.query, self.key, self.value)
        )
        attention.write_kv(key, value, self.kv, batch)
        query = torch.cat([query, query.new_full((padding, *query.shape[1:]), torch.nan)])
        layer = self.layer
        out = attention.paged_attention(query, self.kv, batch, layer.scaling, layer.window, layer.softcap, self.sinks)
        return [out[begin:end] for begin, end in pairwise(batch.query_bounds)]

    def expected(self, number: int, begin: int) -> Tensor:
        """Dense causal attention of one sequence's tokens from `begin` on, float64 [tokens, num_heads, head_dim]."""
        layer = self.layer
        query = self.query[number][begin:].double().transpose(0, 1)
        key, value = (
            states[number].double().repeat_interleave(layer.group, dim=1).transpose(0, 1)
            for states in (self.key, self.value)
        )
        scores = query @ key.transpose(1, 2) * layer.scaling
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        position = torch.arange(self.lengths[number], device=DEVICE)
        age = position[begin:, None] - position[None, :]
        weights = scores.masked_fill((age < 0) | (age >= (layer.window or math.inf)), -math.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if self.sinks is not None:
            total = total + self.sinks.double().exp().view(-1, 1, 1)
        return (weights / total @ value).transpose(0, 1)

    def check(self, number: int, begin: int, got: Tensor) -> None:
        expected = self.expected(number, begin)[: len(got)]
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error <= OPERATION[self.layer.dtype], f"{self.layer}, sequence {number} from {begin}: error {error:.1e}"


LAYERS = [
    Layer(),
    Layer(num_kv_heads=4, group=1, head_dim=8),
    Layer(window=1),
    Layer(window=9, has_sinks=True, softcap=2.0),
    Layer(group=4, has_sinks=True),
    Layer(num_kv_heads=1, group=7, head_dim=64, softcap=50.0),
    Layer(num_kv_heads=1, head_dim=80, window=40),
    Layer(num_kv_heads=1, head_dim=128, page_tokens=16),
    Layer(num_kv_heads=1, head_dim=256, page_tokens=16),
    Layer(dtype=torch.float16, group=7, window=9, page_tokens=16),
    Layer(dtype=torch.bfloat16, group=4, softcap=2.0, has_sinks=True, page_tokens=16),
    Layer(dtype=torch.bfloat16, num_kv_heads=1, head_dim=128, page_tokens=16),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_chunked_sequences_match_dense_attention(layer: Layer) -> None:
    """Some sequences bring one token and others many, in every step."""
    world = World(layer, [3, 77, 1, 42])
    begins = dict.fromkeys(range(4), 0)
    for ends in [{0: 1, 1: 70, 3: 1}, {0: 2, 1: 71, 3: 41}, {0: 3, 1: 77, 2: 1, 3: 42}]:
        chunks = {number: (begins[number], end) for number, end in ends.items()}
        for (number, (begin, _)), got in zip(chunks.items(), world.step(chunks), strict=True):
            world.check(number, begin, got)
        begins |= ends


@pytest.mark.parametrize("layer", [Layer(has_sinks=True), Layer(window=300, softcap=5.0), Layer(group=7)], ids=str)
def test_long_sequences_are_cut_into_splits(layer: Layer) -> None:
    """Lengths around the bounds of splits, and one so long that its splits grow; every one asks with its last token."""
    split = attention.MIN_SPLIT_TOKENS
    most = attention.max_splits(layer.num_kv_heads) * split
    world = World(layer, [split - 1, split, split + 1, 2 * split + 3, 299, 300, 301, most + 5])
    fill(world)
    last = {number: (length - 1, length) for number, length in enumerate(world.lengths)}
    for number, got in enumerate(world.step(last)):
        world.check(number, world.lengths[number] - 1, got)


def fill(world: World) -> None:
    """Put every sequence's keys and values into its pages, as earlier steps would have."""
    size = world.layer.page_tokens
    for number, length in enumerate(world.lengths):
        for place, page in enumerate(world.pages[number]):
            tokens = slice(place * size, min((place + 1) * size, length))
            for kind, states in enumerate((world.key[number], world.value[number])):
                world.kv[page, kind, : tokens.stop - tokens.start] = states[tokens]


@pytest.mark.parametrize("layer", [Layer(), Layer(window=40, has_sinks=True)], ids=str)
def test_no_neighbour_changes_a_bit(layer: Layer) -> None:
    """Chunks alone, and the same chunks beside others, padding included: one token of a long sequence, and many."""
    world = World(layer, [400, 150, 5, 64])
    fill(world)
    chunks = {0: (399, 400), 1: (101, 150), 2: (4, 5), 3: (0, 64)}
    alone = {number: world.step({number: chunk})[0] for number, chunk in chunks.items()}
    for together in (chunks, {3: chunks[3], 0: chunks[0]}, {2: chunks[2], 0: chunks[0]}):
        for padding in (0, 2):
            for number, got in zip(together, world.step(together, padding), strict=False):
                assert torch.equal(got, alone[number]), f"sequence {number} among {list(together)}, {padding} padding"


def test_padding_gets_zeros() -> None:
    world = World(Layer(), [30, 3])
    fill(world)
    for got in world.step({0: (29, 30), 1: (2, 3)}, padding=3)[2:]:
        assert not got.any()


def test_a_step_writes_its_own_places_only() -> None:
    world = World(Layer(num_kv_heads=3, head_dim=10), [9, 6])
    world.step({0: (0, 9), 1: (0, 6)})
    written = ~world.pool[:, 1].isnan().flatten(3).all(-1)  # [pages, 2, page_tokens]
    assert written.flatten(1).sum() == 2 * 15
    assert world.pool[:, 0].isnan().all()
    held = world.pool[world.pages[0], 1].transpose(0, 1).flatten(1, 2)[:, :9]  # [2, tokens, heads, dim]
    assert torch.equal(held, torch.stack([world.key[0], world.value[0]]))


def test_states_of_other_strides() -> None:
    """As transformers hands them over: heads before tokens, and slices of one projection's output."""
    layer = Layer()
    world = World(layer, [20])
    world.query = [states.transpose(0, 1).contiguous().transpose(0, 1) for states in world.query]
    width = layer.num_kv_heads * layer.head_dim
    projected = torch.cat([world.key[0].flatten(1), world.value[0].flatten(1)], dim=1)
    batch = world.batch({0: (0, 20)})
    key, value = (part.view(20, layer.num_kv_heads, -1) for part in (projected[:, :width], projected[:, width:]))
    attention.write_kv(key, value, world.kv, batch)
    world.check(0, 0, attention.paged_attention(world.query[0], world.kv, batch, layer.scaling))


def test_a_pool_of_more_elements_than_32_bits_count(tmp_path: Path) -> None:
    """Pages 2**30 elements apart, in a file that has hardly any content."""
    layer = Layer(dtype=torch.float16)
    world = World(layer, [9])
    page, far = world.pool[0, 1], 2**30
    pool = torch.from_file(str(tmp_path / "pool"), shared=True, size=3 * far, dtype=layer.dtype)
    world.pages = [[1, 2, 0]]
    world.pool = pool.as_strided((3, 2, *page.shape), (far, 0, *page.stride())).to(DEVICE)
    for begin, end in ((0, 8), (8, 9)):
        world.check(0, begin, world.step({0: (begin, end)})[0])


@dataclass(frozen=True)
class Shape:
    """A layer as the compiler sees it, and what its machine code may cost."""

    head_dim: int
    group: int
    num_kv_heads: int
    dtype: torch.dtype = torch.bfloat16
    has_window: bool = False
    has_softcap: bool = False


MODULE = "heddle_kernels.triton_kernels.attention"
STRIDES = ("query_token_stride", "query_head_stride", "page_stride", "value_offset", "place_stride", "kv_head_stride")
QWEN_HALF_BILLION = Shape(head_dim=64, group=7, num_kv_heads=2)
LLAMA_EIGHT_BILLION = Shape(head_dim=128, group=4, num_kv_heads=8)
GEMMA = Shape(head_dim=256, group=2, num_kv_heads=4, has_window=True, has_softcap=True)


def aot_kernel(name: str, shape: Shape, tile: dict[str, int], arch: int) -> AotKernel:
    """One of the two big kernels as `paged_attention` launches it."""
    element = "*" + {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[shape.dtype]
    signature = dict.fromkeys(("query_ptr", "kv_ptr", "out_ptr"), element)
    signature |= dict.fromkeys(("query_start_ptr", "length_ptr", "page_table_ptr"), "*i32")
    signature |= dict.fromkeys(("page_table_stride", "window", *STRIDES), "i32") | {"scale": "fp32", "softcap": "fp32"}
    constants: dict[str, int | bool | None] = {
        "PAGE_TOKENS": 16,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "GROUP": shape.group,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_DIM": max(16, 1 << (shape.head_dim - 1).bit_length()),
        "HAS_WINDOW": shape.has_window,
        "HAS_SOFTCAP": shape.has_softcap,
        "HAS_SINKS": False,
        "sinks_ptr": None,
        "UPCAST": False,
        **{option: size for option, size in tile.items() if option.startswith("BLOCK")},
    }
    if name == "_decode_kernel":
        signature |= {"partial_ptr": "*fp32", "statistics_ptr": "*fp32", "splits": "i32"}
        constants |= {"BLOCK_GROUP": 16, "MIN_SPLIT": attention.MIN_SPLIT_TOKENS}
        constants["MAX_SPLITS"] = attention.max_splits(shape.num_kv_heads)
    else:
        signature["num_sequences"] = "i32"
    num_warps, num_stages = (tile[option] for option in ("num_warps", "num_stages"))
    return AotKernel(MODULE, name, signature, constants, STRIDES, num_warps, num_stages, arch)


def decode_kernel(shape: Shape, arch: int) -> AotKernel:
    return aot_kernel("_decode_kernel", shape, attention.decode_tile(shape.head_dim, shape.dtype), arch)


def prefill_kernel(shape: Shape, arch: int) -> AotKernel:
    tile = attention.prefill_tile(shape.head_dim, shape.dtype, shape.group, arch)
    return aot_kernel("_prefill_kernel", shape, tile, arch)


def test_machine_code() -> None:
    """No spilled register, keys and values loaded 16 bytes at a time, products on tensor cores, room for more."""
    cases = [(QWEN_HALF_BILLION, 80), (QWEN_HALF_BILLION, 90), (GEMMA, 90)]
    cases += [(LLAMA_EIGHT_BILLION, arch) for arch in (80, 89, 90)]
    kernels = [make(shape, arch) for shape, arch in cases for make in (decode_kernel, prefill_kernel)]
    for compiled in compile_all(kernels):
        kernel = compiled.kernel
        name = f"{kernel.name}, heads of {kernel.constants['HEAD_DIM']}, sm_{kernel.arch}"
        is_decode = kernel.name == "_decode_kernel"
        assert compiled.spill_bytes == 0, name
        assert compiled.registers <= (144 if is_decode else 255), f"{name}: {compiled.registers} registers"
        assert compiled.shared_bytes <= (48 if is_decode else 100) * 1024, f"{name}: {compiled.shared_bytes} bytes"
        narrow = [text for text in compiled.instructions if text.startswith("LDGSTS") and ".128" not in text]
        assert compiled.count(r"LDGSTS\S*\.128") >= 16, name
        assert len(narrow) <= 24, f"{name}: more narrow loads than those of the page table"
        multiply = "HGMMA" if kernel.arch == 90 and not is_decode else "HMMA"
        assert compiled.count(multiply), f"{name}: no {multiply}"
