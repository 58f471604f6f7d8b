"""Every kernel, compiled, on an NVIDIA GPU, in the sizes of real models, against plain torch. `make gpu` runs it.

Without a GPU it is skipped; with HEDDLE_INTERPRET=1 it runs in Triton's interpreter in small sizes, to test the tests.
"""

from __future__ import annotations

import os
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from heddle_demo.bench.mixes import MIXES
from heddle_demo.bench.random_rows import RandomRows
from heddle_kernels import torch_elementwise
from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.reference import ReferenceOps
from heddle_kernels.segments import BASE_SLOT, Segments
from tolerances import OPERATION

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not ON_GPU and not os.environ.get("HEDDLE_INTERPRET"), reason="needs an NVIDIA GPU"),
]
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# in_features and out_features of the linears that are computed together.
GROUPS: dict[str, tuple[int, tuple[int, ...]]] = (
    {
        "8b qkv": (4096, (4096, 1024, 1024)),
        "8b gate_up": (4096, (14_336, 14_336)),
        "8b down": (14_336, (4096,)),
        "0.5b qkv": (896, (896, 128, 128)),
        "0.5b down": (4864, (896,)),
    }
    if ON_GPU
    else {"small": (256, (130, 30, 64))}
)
RANKS = {"16": [16] * 32, "mixed": [8, 16, 32, 64, 128, 3, 1, 17] * 4} if ON_GPU else {"mixed": [8, 3, 1, 17] * 2}
BATCHES = (1, 8, 32) if ON_GPU else (1, 8)
TOKENS = (1, 3, 16, 17, 33, 64, 65, 128, 129, 300) if ON_GPU else (1, 17, 129)
# (num_heads, num_kv_heads, head_dim) of Llama 3.1 8B, Qwen2.5 0.5B and 7B, Gemma 2 and Phi-3
HEADS = ((32, 8, 128), (14, 2, 64), (28, 4, 128), (8, 4, 256), (32, 32, 96)) if ON_GPU else ((14, 2, 64), (4, 2, 16))
LENGTHS = (1, 16, 17, 511, 2000) if ON_GPU else (1, 16, 33)
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float32,)
# All sizes in the first dtype, one size in the others: a compiler's minute buys no more.
GROUP_CASES = [(name, DTYPES[0]) for name in GROUPS] + [(next(iter(GROUPS)), dtype) for dtype in DTYPES[1:]]
HEAD_CASES = [(heads, DTYPES[0]) for heads in HEADS] + [(HEADS[1], dtype) for dtype in DTYPES[1:]]
# Relative error in the 2-norm of a 4-bit product: codes rounded to the activations' dtype, for more than 64 tokens the
# scaled weights as well, and the output's own rounding.
NF4_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def triton_ops(dtype: torch.dtype):  # type: ignore[no-untyped-def]  # its module imports triton, which may be absent
    from heddle_kernels.triton_kernels.ops import TritonOps

    return TritonOps(DEVICE)


def normal(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.isfinite().all()
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= 2 * OPERATION[dtype], f"relative error {error:.1e}"  # both sides round


def in_float32(rows: RandomRows) -> RandomRows:
    return RandomRows(rows.rows.float(), rows.vectors, rows.table, rows.groups, rows.ranks)


def slots_of(batch: int, popularity: str, num_adapters: int) -> list[int]:
    """Sorted, with some tokens of the base before the others."""
    slots = sorted(slot for slot in MIXES[popularity](batch, num_adapters) if slot is not None)
    return [BASE_SLOT, BASE_SLOT, *slots]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("name", "dtype"), GROUP_CASES, ids=str)
def test_rows(name: str, ranks: str, dtype: torch.dtype) -> None:
    """Shrink and expand of a decode step, and of a prompt, in place over the base's output."""
    torch.manual_seed(0)
    in_features, out_features = GROUPS[name]
    rows = RandomRows.of(in_features, out_features, RANKS[ranks], 2, dtype, DEVICE)
    exact, ops, truth = in_float32(rows), triton_ops(dtype), ReferenceOps()
    ops.prepare(rows.groups, dtype)
    group = rows.groups[1]
    steps = [
        Segments.from_runs((slot, 1) for slot in slots_of(batch, popularity, len(RANKS[ranks])))
        for batch in BATCHES
        for popularity in ("distinct", "identical", "skewed")
    ]
    steps.append(Segments.from_runs([(BASE_SLOT, 5), (0, 37), (1, 130), (3, 1)]))
    for segments in steps:
        x = normal(dtype, segments.num_tokens, in_features)
        y = normal(dtype, segments.num_tokens, sum(out_features))
        bias, expected = normal(dtype, sum(out_features)), y.float()
        plan = ops.plan_rows(rows.rows, rows.vectors, rows.table, segments)
        ops.expand_add(y, ops.shrink(x, plan, group), plan, group, bias)
        plan = truth.plan_rows(exact.rows, exact.vectors, exact.table, segments)
        truth.expand_add(expected, truth.shrink(x.float(), plan, group), plan, group, bias.float())
        assert_close(y, expected, dtype)


@pytest.mark.parametrize(("name", "dtype"), GROUP_CASES, ids=str)
def test_nf4_linear(name: str, dtype: torch.dtype) -> None:
    """By itself for few and for many tokens; and its split sums, finished by the adapters' expand."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    in_features, out_features = GROUPS[name]
    num_rows = sum(out_features)
    weight = torch.randn(num_rows, in_features, device=DEVICE) * in_features**-0.5
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    exact, bias = functional.dequantize_4bit(packed, state).double(), normal(dtype, num_rows)
    ops = triton_ops(dtype)
    linear = ops.nf4_linear(packed, state, bias, dtype)
    for num_tokens in TOKENS:
        x = normal(dtype, num_tokens, in_features)
        expected = x.double() @ exact.T + bias.double()
        error = (linear(x).double() - expected).norm() / expected.norm()
        assert error <= NF4_ERROR[dtype], f"{num_tokens} tokens: relative error {error:.1e}"
    rows = RandomRows.of(in_features, out_features, [8, 16, 3, 32], 1, dtype, DEVICE)
    ops.prepare(rows.groups, dtype)
    segments = Segments.from_runs([(BASE_SLOT, 2), (0, 1), (2, 3), (3, 1)])
    x = normal(dtype, segments.num_tokens, in_features)
    plan = ops.plan_rows(rows.rows, rows.vectors, rows.table, segments)
    h = ops.shrink(x, plan, rows.groups[0])
    y = ops.expand_sums(linear.partial_sums(x), h, plan, rows.groups[0], bias, dtype)
    expected = (x.double() @ exact.T + bias.double()).float()
    truth, wide = ReferenceOps(), in_float32(rows)
    plan = truth.plan_rows(wide.rows, wide.vectors, wide.table, segments)
    truth.expand_add(expected, truth.shrink(x.float(), plan, rows.groups[0]), plan, rows.groups[0], bias.float())
    error = (y.double() - expected.double()).norm() / expected.double().norm()
    assert error <= NF4_ERROR[dtype], f"with adapters: relative error {error:.1e}"


def paged_batch(lengths: list[int], new_tokens: list[int]) -> PagedBatch:
    """Sequences of these lengths, the last `new_tokens` of each being new, on pages of 16 in an order of their own."""
    counts = [-(-length // 16) for length in lengths]
    order = torch.randperm(sum(counts)).tolist()
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    bounds, slots = [0, *accumulate(new_tokens)], list[int]()
    for number, (length, new, end) in enumerate(zip(lengths, new_tokens, accumulate(counts), strict=True)):
        pages = order[end - counts[number] : end]
        table[number, : len(pages)] = torch.tensor(pages)
        slots += [pages[place // 16] * 16 + place % 16 for place in range(length - new, length)]
    return PagedBatch(
        query_start=torch.tensor(bounds, dtype=torch.int32, device=DEVICE),
        length=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        page_table=table.to(DEVICE),
        write_slot=torch.tensor(slots, device=DEVICE),
        query_bounds=tuple(bounds),
        lengths=tuple(lengths),
    )


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, 30.0)])
@pytest.mark.parametrize("is_decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize(("heads", "dtype"), HEAD_CASES, ids=str)
def test_attention(
    heads: tuple[int, int, int], is_decode: bool, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    """New keys and values are written to their pages, and every sequence attends to its own."""
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    lengths = list(LENGTHS)
    new_tokens = [1] * len(lengths) if is_decode else [min(length, 200) for length in lengths]
    batch = paged_batch(lengths, new_tokens)
    num_pages = sum(-(-length // 16) for length in lengths)
    pool = normal(dtype, num_pages, 2, 2, 16, num_kv_heads, head_dim)  # of two layers: the pages of one lie apart
    exact_pool = pool.float()
    query = normal(dtype, sum(new_tokens), num_heads, head_dim)
    key, value = (normal(dtype, sum(new_tokens), num_kv_heads, head_dim) for _ in range(2))
    ops, truth = triton_ops(dtype), ReferenceOps()
    ops.write_kv(key, value, pool[:, 1], batch)
    truth.write_kv(key.float(), value.float(), exact_pool[:, 1], batch)
    assert torch.equal(pool.float(), exact_pool)
    sinks = normal(torch.float32, num_heads) if window else None
    arguments = (batch, head_dim**-0.5, window, softcap, sinks)
    expected = truth.paged_attention(query.float(), exact_pool[:, 1], *arguments)
    assert_close(ops.paged_attention(query, pool[:, 1], *arguments), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_elementwise(num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    from heddle_kernels.triton_kernels import elementwise

    for width in (896, 4096) if ON_GPU else (96,):
        x, weight = normal(dtype, num_tokens, width), normal(dtype, width)
        expected = torch_elementwise.rms_norm(x.float(), weight.float(), 1e-6)
        assert_close(elementwise.rms_norm(x, weight, 1e-6), expected, dtype)
    for width in (4864, 14_336) if ON_GPU else (200,):
        joined = normal(dtype, num_tokens, 2 * width)
        gate, up = joined[:, :width], joined[:, width:]
        assert_close(elementwise.silu_mul(gate, up), silu(gate.float()) * up.float(), dtype)
    for num_heads, num_kv_heads, head_dim in HEADS:
        query, key = (normal(dtype, 1, count, num_tokens, head_dim) for count in (num_heads, num_kv_heads))
        cos, sin = (normal(dtype, 1, num_tokens, head_dim) for _ in range(2))
        turned = torch_elementwise.rotary(query.float(), key.float(), cos.float(), sin.float())
        for actual, wanted in zip(elementwise.rotary(query, key, cos, sin), turned, strict=True):
            assert_close(actual, wanted, dtype)


@pytest.mark.skipif(not ON_GPU, reason="there are no graphs without a GPU")
def test_a_captured_graph_follows_the_plan() -> None:
    """A decode step's row operations, captured once, serve other adapters and other ranks when the plan changes."""
    from heddle_kernels.triton_kernels.row_plan import PlanCapacity

    torch.manual_seed(0)
    dtype, (in_features, out_features) = torch.bfloat16, GROUPS["0.5b qkv"]
    rows = RandomRows.of(in_features, out_features, RANKS["mixed"], 1, dtype, DEVICE)
    ops, truth, exact, group = triton_ops(dtype), ReferenceOps(), in_float32(rows), rows.groups[0]
    ops.prepare(rows.groups, dtype)
    capacity = PlanCapacity(num_tiles=256, num_token_tiles=64, num_h_values=8 * 3 * 128)
    words = torch.zeros(capacity.num_words, dtype=torch.int32, device=DEVICE)
    x, y = normal(dtype, 8, in_features), normal(dtype, 8, sum(out_features))
    before = y.clone()

    def plan_for(slots: list[int]) -> object:
        segments = Segments.from_runs((slot, 1) for slot in slots)
        return ops.plan_rows_into(words, rows.rows, rows.vectors, rows.table, segments, capacity)

    plan = plan_for(list(range(8)))
    ops.expand_add(y, ops.shrink(x, plan, group), plan, group, None)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.expand_add(y, ops.shrink(x, plan, group), plan, group, None)
    for slots in ([0, 1, 2, 3, 4, 5, 6, 7], [4] * 8, [BASE_SLOT, BASE_SLOT, 1, 1, 1, 9, 12, 20]):
        plan_for(slots)
        y.copy_(before)
        graph.replay()
        expected, segments = before.float(), Segments.from_runs((slot, 1) for slot in slots)
        wide = truth.plan_rows(exact.rows, exact.vectors, exact.table, segments)
        truth.expand_add(expected, truth.shrink(x.float(), wide, group), wide, group, None)
        assert_close(y, expected, dtype)
