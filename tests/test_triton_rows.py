"""The row kernels against the formula in float64, in Triton's interpreter, and their machine code for three GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from heddle_kernels.row_table import ABSENT, RowTable
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_kernels.site_group import SiteGroup
from tolerances import OPERATION
from triton_aot import AotKernel, Compiled, compile_all, count

pytest.importorskip("triton")

from heddle_kernels.triton_kernels import rows
from heddle_kernels.triton_kernels.row_plan import (
    DECODE,
    PREFILL,
    DeviceTable,
    PlanCapacity,
    PlanTooLarge,
    TileShape,
    TritonRowPlan,
)
from heddle_kernels.triton_kernels.target import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FIRST_SITE, NUM_SITES = 2, 6  # other sites lie before and after the group, so that a wrong site number shows
IN_FEATURES = 72
GROUPS = {  # widths that no tile divides, a site of one tile and one of several, odd ones
    "one": SiteGroup(FIRST_SITE, IN_FEATURES, (300,)),
    "two": SiteGroup(FIRST_SITE, IN_FEATURES, (40, 136)),
    "three": SiteGroup(FIRST_SITE, IN_FEATURES, (264, 37, 56)),
}
POPULARITY: dict[str, list[int]] = {  # which slot each run of tokens uses
    "distinct": [0, 1, 2, 3, 4, 5],
    "uniform": [0, 0, 1, 1, 2, 2],
    "zipf": [0, 0, 0, 1, 1, 2],
    "identical": [4, 4, 4, 4, 4, 4],
    "skewed": [0, 0, 0, 0, 0, 5],
    "with_base": [BASE_SLOT, 0, BASE_SLOT, 1, 4, BASE_SLOT],
    "empty": [],
}
LENGTHS = [2, 1, 10, 1, 3, 1]  # tokens of each run; 10 are more than a decode tile
RANKS: dict[str, list[int]] = {  # of each slot
    "1": [1] * 6,
    "8": [8] * 6,
    "17": [17] * 6,
    "64": [64] * 6,
    "256": [256] * 6,
    "mixed": [1, 8, 3, 64, 17, 2],
}
FEW_ROWS = [1, 8, 3, 17, 5, 2]


ACTIVATIONS = (
    lambda h: h,
    torch.relu,
    lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
    torch.nn.functional.silu,
)
# Every result is float32, so only what is compiled, and multiplies on tensor cores, rounds to its inputs' dtype.
TOLERANCE = {dtype: OPERATION[torch.float32] if INTERPRETED else limit for dtype, limit in OPERATION.items()}
VECTORS = ("out_scale", "bias")


class World:
    """A pool that is NaN wherever no row or vector was written, and the table of what was."""

    def __init__(self, dtype: torch.dtype = torch.float32, pool_bytes: int = 1 << 24) -> None:
        memory = torch.full((pool_bytes,), 0xFF, dtype=torch.uint8)
        self.rows, self.vectors = memory.view(dtype), memory.view(torch.float32)
        self.table = RowTable(len(RANKS["mixed"]), NUM_SITES, heap_capacity=1 << 14)
        self.table.gain.fill_(torch.nan)
        self.table.count.fill_(1)  # of sites that do not concern the test: entry 0, whose gain is NaN
        self.generator = torch.Generator().manual_seed(5)
        self._free_bytes = pool_bytes
        self._num_entries = 1

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def place(self, flat: Tensor, width: int) -> int:
        """Write random values below all others, 16-byte aligned, and return where, in elements of `flat`."""
        self._free_bytes -= 16 + -(-width * flat.element_size() // 16) * 16
        begin = self._free_bytes // flat.element_size()
        flat[begin : begin + width] = self.random(width) / width**0.5
        return begin

    def add(self, slot: int, group: SiteGroup, ranks: list[int], vectors: tuple[str, ...] = VECTORS) -> None:
        """Give a slot rows and vectors at every site of the group; activations take turns."""
        for site, rank, width in zip(group.sites, ranks, group.out_features, strict=True):
            entries = [(self.place(self.rows, group.in_features), self.place(self.rows, width)) for _ in range(rank)]
            self.list_rows(slot, site, entries)
            for name in ("in_scale", "out_scale", "bias"):
                vector_width = group.in_features if name == "in_scale" else width
                column = getattr(self.table, name)
                column[slot, site] = self.place(self.vectors, vector_width) if name in vectors else ABSENT

    def list_rows(self, slot: int, site: int, entries: list[tuple[int, int]]) -> None:
        table, heap = self.table, slice(self._num_entries, self._num_entries + len(entries))
        table.first[slot, site], table.count[slot, site] = heap.start, len(entries)
        if entries:
            table.a_offset[heap], table.b_offset[heap] = torch.tensor(entries).T
        table.gain[heap], table.c[heap] = self.random(len(entries)), self.random(len(entries))
        table.activation[heap] = torch.arange(len(entries)).flip(0) % len(ACTIVATIONS)
        self._num_entries = heap.stop

    def rows_at(self, offsets: Tensor, width: int) -> Tensor:
        return self.rows[offsets[:, None] + torch.arange(width)].double()

    def vector(self, name: str, slot: int, site: int, width: int, absent: float) -> Tensor:
        begin = int(getattr(self.table, name)[slot, site])
        return torch.full([width], absent).double() if begin == ABSENT else self.vectors[begin:][:width].double()


@dataclass
class Step:
    """A batch: its inputs, and what the base made of them."""

    segments: Segments
    x: Tensor  # [num_tokens, in_features]
    workspace: Tensor  # [splits, num_tokens, padded width] float32, whose padding is NaN
    base_bias: Tensor  # [width]


def make_step(world: World, group: SiteGroup, segments: Segments) -> Step:
    width = sum(group.out_features)
    workspace = torch.full([3, segments.num_tokens, -(-width // 128) * 128], torch.nan)
    workspace[:, :, :width] = world.random(3, segments.num_tokens, width)
    x = world.random(segments.num_tokens, group.in_features)
    return Step(segments, x.to(world.rows.dtype), workspace, world.random(width))


def formula(world: World, group: SiteGroup, step: Step) -> Tensor:
    """What every token's output must be, float64 [num_tokens, width]."""
    out = step.workspace.double().sum(0)[:, : sum(group.out_features)] + step.base_bias
    for begin, end, slot in step.segments.with_adapters():
        for site, column, width in zip(group.sites, group.column_start, group.out_features, strict=True):
            columns = slice(column, column + width)
            heap = slice(first := int(world.table.first[slot, site]), first + int(world.table.count[slot, site]))
            h = (
                step.x[begin:end].double() @ world.rows_at(world.table.a_offset[heap], group.in_features).T
                + world.table.c[heap]
            )
            for row, number in enumerate(world.table.activation[heap].tolist()):
                h[:, row] = ACTIVATIONS[number](h[:, row])
            total = (out[begin:end, columns] - step.base_bias[columns]) * world.vector(
                "out_scale", slot, site, width, 1
            )
            total += step.base_bias[columns] + world.vector("bias", slot, site, width, 0)
            weighted = h * world.table.gain[heap]
            out[begin:end, columns] = total + weighted @ world.rows_at(world.table.b_offset[heap], width)
    return out


def rows_of_slot(world: World, group: SiteGroup) -> NDArray[np.int32]:
    num_rows: NDArray[np.int32] = world.table.count[:, group.sites.start : group.sites.stop].sum(1).int().numpy()
    return num_rows


def run(
    world: World,
    group: SiteGroup,
    step: Step,
    in_place: bool = False,
    shape: TileShape = DECODE,
    capacity: PlanCapacity | None = None,
) -> Tensor:
    """The kernels' answer, float32 [num_tokens, width]."""
    width = sum(group.out_features)
    table = DeviceTable(world.table, DEVICE)
    packed = TritonRowPlan.pack(step.segments, rows_of_slot(world, group), shape, capacity)
    plan = packed.views(torch.from_numpy(packed.words).to(DEVICE))
    flat, vectors, x, base_bias = (t.to(DEVICE) for t in (world.rows, world.vectors, step.x, step.base_bias))
    h = rows.shrink(x, flat, table, plan, group)
    if in_place:
        out = (step.workspace.sum(0)[:, :width] + step.base_bias).to(DEVICE)
        source = out
    else:
        out = torch.full([step.segments.num_tokens, width], torch.nan, device=DEVICE)
        source = step.workspace.to(DEVICE)
    rows.expand(source, h, flat, vectors, table, plan, group, base_bias, out)
    return out.cpu()


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Of the largest deviation to the largest value; NaN counts as infinite."""
    if truth.numel() == 0:
        return 0.0
    return ((actual.double() - truth).abs().max() / truth.abs().max()).nan_to_num(torch.inf).item()


def segments_of(slots: list[int]) -> Segments:
    return Segments.from_runs(zip(slots, LENGTHS, strict=False))


def world_of(
    group: SiteGroup, ranks: list[int], dtype: torch.dtype = torch.float32, vectors: tuple[str, ...] = VECTORS
) -> World:
    """Slots of these ranks. A group's second site has no rows in slot 0 and its first none in slot 1."""
    world = World(dtype)
    for slot, rank in enumerate(ranks):
        at_sites = [0 if slot + site == 1 else rank for site in range(len(group.sites))]
        world.add(slot, group, at_sites if len(at_sites) > 1 else [rank], vectors)
    return world


@pytest.mark.parametrize("popularity", POPULARITY)
def test_every_popularity(popularity: str) -> None:
    group = GROUPS["two"]
    world = world_of(group, RANKS["mixed"], torch.bfloat16)
    step = make_step(world, group, segments_of(POPULARITY[popularity]))
    assert relative_error(run(world, group, step), formula(world, group, step)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank(ranks: str) -> None:
    group = GROUPS["two"]
    world = world_of(group, RANKS[ranks], torch.bfloat16)
    step = make_step(world, group, Segments.from_runs([(0, 1), (3, 2), (BASE_SLOT, 1), (4, 1)]))
    assert relative_error(run(world, group, step), formula(world, group, step)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("dtype", "group"),
    [*((dtype, GROUPS["three"]) for dtype in OPERATION), *((torch.float16, GROUPS[name]) for name in ("one", "two"))],
)
def test_every_dtype_and_group(dtype: torch.dtype, group: SiteGroup, in_place: bool) -> None:
    world = world_of(group, FEW_ROWS, dtype)
    step = make_step(world, group, segments_of(POPULARITY["with_base"]))
    assert relative_error(run(world, group, step, in_place), formula(world, group, step)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_tiles_of_many_tokens(dtype: torch.dtype, in_place: bool) -> None:
    group = GROUPS["three"]
    world = world_of(group, RANKS["mixed"], dtype)
    step = make_step(world, group, Segments.from_runs([(3, 70), (BASE_SLOT, 2), (4, 1)]))
    error = relative_error(run(world, group, step, in_place, PREFILL), formula(world, group, step))
    assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("in_features", [1100, 9000])  # three splits of one grain, several of many; neither fills up
def test_a_wide_input_is_split(in_features: int, shape: TileShape) -> None:
    group = SiteGroup(FIRST_SITE, in_features, (40,))
    world = world_of(group, [2, 1], torch.bfloat16)
    step = make_step(world, group, Segments.from_runs([(0, 2), (1, 1)]))
    assert rows.num_splits(in_features, shape) > 2
    error = relative_error(run(world, group, step, shape=shape), formula(world, group, step))
    assert error <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("vectors", [("in_scale",), ("out_scale",), ("bias",), ()])
def test_vectors_with_and_without_rows(vectors: tuple[str, ...], shape: TileShape) -> None:
    group = SiteGroup(FIRST_SITE, IN_FEATURES, (136,))
    world = world_of(group, [3, 0], vectors=vectors)
    step = make_step(world, group, segments_of([0, 1, BASE_SLOT]))
    for in_place in (False, True):
        error = relative_error(run(world, group, step, in_place, shape), formula(world, group, step))
        assert error <= TOLERANCE[torch.float32]


def test_a_mix_lists_rows_of_two_adapters() -> None:
    group = GROUPS["two"]
    world = world_of(group, [3, 18, 0], vectors=())
    for site in group.sites:
        heaps = [
            range(first := int(world.table.first[slot, site]), first + int(world.table.count[slot, site]))
            for slot in (0, 1)
        ]
        entries = [(int(world.table.a_offset[e]), int(world.table.b_offset[e])) for heap in heaps for e in heap]
        world.list_rows(2, site, entries)
    step = make_step(world, group, Segments.from_runs([(0, 1), (2, 3), (1, 1)]))
    assert relative_error(run(world, group, step), formula(world, group, step)) <= TOLERANCE[torch.float32]


def test_base_tokens_stay_as_they_are_or_are_summed_exactly() -> None:
    group = GROUPS["two"]
    world = world_of(group, FEW_ROWS)
    step = make_step(world, group, segments_of(POPULARITY["with_base"]))
    is_base = torch.zeros(step.segments.num_tokens, dtype=torch.bool)
    for begin, end, slot in zip(step.segments.start, step.segments.start[1:], step.segments.slot, strict=False):
        is_base[begin:end] = slot == BASE_SLOT
    width = sum(group.out_features)
    in_place, summed = run(world, group, step, in_place=True), run(world, group, step)
    parts = step.workspace[:, :, :width]
    assert torch.equal(in_place[is_base], (step.workspace.sum(0)[:, :width] + step.base_bias)[is_base])
    assert torch.equal(summed[is_base], (parts[0] + parts[1] + parts[2] + step.base_bias)[is_base])
    assert not torch.isclose(summed[~is_base], (parts.sum(0) + step.base_bias)[~is_base]).all(1).any()


@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_a_segment_does_not_notice_its_neighbours(shape: TileShape) -> None:
    group = GROUPS["two"]
    world = world_of(group, FEW_ROWS)
    crowd = make_step(world, group, segments_of(POPULARITY["distinct"]))
    outputs = run(world, group, crowd, shape=shape)
    for begin, end, slot in crowd.segments.with_adapters():
        workspace = crowd.workspace[:, begin:end].contiguous()
        alone = Step(Segments((0, end - begin), (slot,)), crowd.x[begin:end], workspace, crowd.base_bias)
        assert torch.equal(run(world, group, alone, shape=shape), outputs[begin:end]), f"slot {slot}"


@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_a_padded_plan_changes_nothing(shape: TileShape) -> None:
    group = GROUPS["two"]
    world = world_of(group, FEW_ROWS)
    step = make_step(world, group, segments_of(POPULARITY["with_base"]))
    padded = run(world, group, step, shape=shape, capacity=PlanCapacity(100, 90, 20_000))
    assert torch.equal(padded, run(world, group, step, shape=shape))


def test_an_empty_step_fits_a_graph() -> None:
    world = world_of(GROUPS["one"], FEW_ROWS)
    step = make_step(world, GROUPS["one"], Segments.from_runs([]))
    assert run(world, GROUPS["one"], step, capacity=PlanCapacity(5, 5, 100)).shape == (0, 300)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter takes the precision as an argument")
def test_sixteen_bit_products_keep_what_the_dot_products_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without widening, float16 rows are multiplied as the GPU does it, and the dot products must not be rounded."""
    monkeypatch.setattr(rows, "INTERPRETED", False)
    group = GROUPS["two"]
    world = world_of(group, RANKS["mixed"], torch.float16)
    step = make_step(world, group, Segments.from_runs([(3, 5), (4, 1)]))
    for shape in (DECODE, PREFILL):
        assert relative_error(run(world, group, step, shape=shape), formula(world, group, step)) <= 2e-6


@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_scale_input(dtype: torch.dtype, shape: TileShape) -> None:
    group = SiteGroup(FIRST_SITE, 300, (8,))
    world = World(dtype)
    world.add(0, group, [1], ("in_scale",))
    world.add(1, group, [1], ("bias",))
    step = make_step(world, group, segments_of([0, BASE_SLOT, 1, 0]))
    packed = TritonRowPlan.pack(step.segments, rows_of_slot(world, group), shape)
    plan = packed.views(torch.from_numpy(packed.words).to(DEVICE))
    table = DeviceTable(world.table, DEVICE)
    scaled = rows.scale_input(step.x.to(DEVICE), world.vectors.to(DEVICE), table, plan, FIRST_SITE).cpu()
    truth = step.x.double()
    for begin, end, slot in step.segments.with_adapters():
        truth[begin:end] *= world.vector("in_scale", slot, FIRST_SITE, 300, absent=1)
    assert torch.equal(scaled[2:13], step.x[2:13])  # tokens without such a vector
    assert relative_error(scaled, truth) <= OPERATION[dtype]


@pytest.mark.parametrize("shape", [DECODE, PREFILL, TileShape(4, 3, 2)], ids=["decode", "prefill", "odd"])
@pytest.mark.parametrize("popularity", POPULARITY)
def test_a_plan_lists_every_piece_of_work_once(popularity: str, shape: TileShape) -> None:
    segments, rows_of_slot = segments_of(POPULARITY[popularity]), np.array([0, 17, 3, 64, 5, 130], np.int32)
    packed = TritonRowPlan.pack(segments, rows_of_slot, shape)
    plan = packed.views(torch.from_numpy(packed.words))
    assert plan.counters.tolist() == [len(plan.tiles), len(plan.token_tiles)]
    expected, h = [], 0
    for begin, end, slot in segments.with_adapters():
        num_rows = int(rows_of_slot[slot])
        for token in range(begin, end):
            expected += [(token, row, slot, h + (token - begin) * num_rows + row) for row in range(num_rows)]
        h += (end - begin) * int(rows_of_slot[slot])
    listed = []
    for first_token, num_tokens, slot, h_begin, h_stride, first_row in plan.tiles.tolist():
        assert 0 < num_tokens <= shape.shrink_tokens
        tile_rows = range(first_row, min(first_row + shape.shrink_rows, h_stride))
        for token in range(num_tokens):
            listed += [(first_token + token, row, slot, h_begin + token * h_stride + row) for row in tile_rows]
    assert sorted(listed) == expected
    assert plan.num_h_values == h
    tokens = []
    for first_token, num_tokens, slot, h_begin, h_stride, _ in plan.token_tiles.tolist():
        assert 0 < num_tokens <= shape.expand_tokens
        tokens += [(first_token + token, slot, h_begin + token * h_stride) for token in range(num_tokens)]
    owner = [
        slot
        for slot, begin, end in zip(segments.slot, segments.start, segments.start[1:], strict=False)
        for _ in range(begin, end)
    ]
    assert [(token, slot) for token, slot, _ in tokens] == list(enumerate(owner))
    assert {(token, slot, h) for token, slot, h in tokens if slot != BASE_SLOT and rows_of_slot[slot]} == {
        (token, slot, h) for token, row, slot, h in expected if row == 0
    }


@pytest.mark.parametrize("missing", ["num_tiles", "num_token_tiles", "num_h_values"])
def test_a_step_beyond_the_capacity_is_refused(missing: str) -> None:
    segments, rows_of_slot = Segments.from_runs([(0, 9), (BASE_SLOT, 2)]), np.array([17], np.int32)
    needed = PlanCapacity(num_tiles=2 * 2, num_token_tiles=11, num_h_values=9 * 17)
    assert TritonRowPlan.pack(segments, rows_of_slot, DECODE, needed).capacity == needed
    short = replace(needed, **{missing: getattr(needed, missing) - 1})
    with pytest.raises(PlanTooLarge, match=f"needs {getattr(needed, missing)} {missing.removeprefix('num_')}"):
        TritonRowPlan.pack(segments, rows_of_slot, DECODE, short)


def test_the_device_table_follows_changes() -> None:
    table = world_of(GROUPS["one"], [2, 1]).table
    mirror = DeviceTable(table, DEVICE)
    assert len(mirror.sync(table)) == 0
    table.first[1, 3], table.bias[0, 2], table.gain[4], table.activation[9] = 77, 78, 79, 3
    table.note_change(1, slice(4, 5))
    table.note_change(3, slice(9, 11))
    assert mirror.sync(table).tolist() == [1, 3]
    assert mirror.first[1, 3] == 77
    assert mirror.bias[0, 2] != 78  # nobody said that slot 0 had changed
    assert mirror.gain[4] == 79
    assert mirror.activation[9] == 3
    assert mirror.generation == 0
    table.grow(9, table.heap_capacity + 5)
    table.bias[8] = 5
    assert mirror.sync(table).tolist() == list(range(9))
    assert mirror.bias[8].tolist() == [5] * NUM_SITES
    assert len(mirror.gain) == table.heap_capacity
    assert mirror.generation == 1


QKV, DOWN = SiteGroup(0, 4096, (4096, 1024, 1024)), SiteGroup(3, 14336, (4096,))  # of an 8B model
INTEGERS = ("num_tokens", "num_h_values", "num_sites", "first_site")
TABLE = {"counters": "*i32", "tiles": "*i32", "first": "*i32", "count": "*i32", "out_scale": "*i64"}
HEAP = {"bias": "*i64", "a_offset": "*i64", "b_offset": "*i64", "gain": "*fp32", "c": "*fp32", "activation": "*i8"}
SHARED_BYTES = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10}  # of a multiprocessor


@dataclass(frozen=True)
class Case:
    """A kernel to compile. `num_sources` 0 stands for a base output changed in place."""

    name: str
    group: SiteGroup
    shape: TileShape
    dtype: str = "bf16"
    arch: int = 90
    num_sources: int = 8

    def kernel(self) -> AotKernel:
        element_bytes = 4 if self.dtype == "fp32" else 2
        pointers = dict.fromkeys(("x", "rows", "base_bias", "out"), "*" + self.dtype)
        pointers |= {"vectors": "*fp32", "h": "*fp32", "source": "*fp32" if self.num_sources else "*" + self.dtype}
        types = pointers | TABLE | HEAP | dict.fromkeys(INTEGERS, "i32")
        constants: dict[str, int] = {"UPCAST": False}
        if self.name == "_shrink_kernel":
            constants |= rows.shrink_constants(self.group, self.shape, element_bytes)
        else:
            constants |= rows.expand_constants(self.group, self.shape, element_bytes)
            constants["NUM_SPLITS"] = rows.num_splits(self.group.in_features, self.shape)
            constants |= {"NUM_SOURCES": max(1, self.num_sources), "SOURCE_WIDTH": sum(self.group.out_features)}
            constants |= {"IN_PLACE": self.num_sources == 0, "HAS_BASE_BIAS": True}
        signature = {name: types[name] for name in getattr(rows, self.name).arg_names if name in types}
        num_warps = rows.warps_of(self.shape)
        return AotKernel(rows.__name__, self.name, signature, constants, num_warps=num_warps, arch=self.arch)


CASES = [
    Case(name, group, shape, arch=arch)
    for arch in (80, 89, 90)
    for name, group in (("_shrink_kernel", DOWN), ("_expand_kernel", QKV))
    for shape in (DECODE, PREFILL)
]
CASES += [Case("_expand_kernel", QKV, PREFILL, num_sources=0), Case("_expand_kernel", DOWN, DECODE, "fp16")]
CASES += [Case("_shrink_kernel", DOWN, DECODE, "fp32"), Case("_expand_kernel", DOWN, PREFILL, "fp32")]


@pytest.fixture(scope="module")
def compiled() -> dict[Case, Compiled]:
    return dict(zip(CASES, compile_all([case.kernel() for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_machine_code(case: Case, compiled: dict[Case, Compiled]) -> None:
    code = compiled[case]
    is_decode, is_shrink = case.shape == DECODE, case.name == "_shrink_kernel"
    assert code.spill_bytes == 0
    registers_of_program = 32 * code.kernel.num_warps * -(-code.registers // 8) * 8
    resident = min(65536 // registers_of_program, SHARED_BYTES[case.arch] // (code.shared_bytes + 1024))
    assert resident >= (3 if is_decode else 2), "too few programs at once to keep the memory busy"
    if is_shrink:
        assert count(code.loop_with(r"LDGSTS\S*\.128"), r"LDGSTS\S*\.128") >= 4
        assert count(code.loop_with(r"LDGSTS\S*\.128"), r"LDGSTS(?!\S*\.128)") == 0
    elif is_decode:  # 16 rows, each thread with the same 16 bytes of every row, and nothing multiplied twice
        loop = code.loop_with(r"LDG\S*\.128")
        assert count(loop, r"LDG\S*\.128") == 16
        assert len(loop) < 650
    else:
        assert code.count(r"LDG\S*\.128") >= 6
    if case.dtype == "fp32" or (is_decode and not is_shrink):
        assert code.count("H?G?MMA") == 0
    elif case.arch == 90 and not is_decode:
        assert code.count("HGMMA") > 0
    else:
        assert code.count("HMMA") > 0
