"""Norms, rotary positions and gated activations, in Triton and in torch, against float64; and their machine code."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from heddle_kernels import torch_elementwise
from tolerances import OPERATION
from triton_aot import AotKernel, compile_all

pytest.importorskip("triton")
from heddle_kernels.triton_kernels import elementwise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULE = "heddle_kernels.triton_kernels.elementwise"
ARCHES = [80, 90]
BOTH = pytest.mark.parametrize("ops", [elementwise, torch_elementwise], ids=["triton", "torch"])
DTYPES = pytest.mark.parametrize("dtype", OPERATION, ids=str)


def normal(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def assert_close(computed: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert computed.dtype == dtype
    assert computed.shape == expected.shape
    error = (computed.double() - expected).abs().max() / expected.abs().max()
    assert error <= OPERATION[dtype], f"relative error {error:.1e}"


@BOTH
@DTYPES
@pytest.mark.parametrize(("adds_one", "rounds_first"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("width", [8, 96, 896, 1500])
def test_rms_norm(ops: ModuleType, dtype: torch.dtype, adds_one: bool, rounds_first: bool, width: int) -> None:
    torch.manual_seed(width)
    x, weight = normal(dtype, 5, width), normal(dtype, width)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    expected = expected * (weight.double() + adds_one)
    given = x.clone()
    assert_close(ops.rms_norm(given, weight, 1e-3, adds_one, rounds_first), expected, dtype)
    assert torch.equal(given, x), "the input was changed"


@BOTH
def test_rms_norm_of_heads_inside_a_longer_row(ops: ModuleType) -> None:
    """A head's values are side by side, but the heads are columns of a fused projection's output."""
    torch.manual_seed(0)
    projected, weight = normal(torch.float32, 1, 6, 100), normal(torch.float32, 16)
    heads = projected[..., 20:84].view(1, 6, 4, 16)
    expected = heads.double() / (heads.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert_close(ops.rms_norm(heads, weight, 1e-6), expected, torch.float32)


@BOTH
def test_every_line_is_normed_alike_whatever_stands_beside_it(ops: ModuleType) -> None:
    torch.manual_seed(0)
    x, weight = normal(torch.float32, 7, 96), normal(torch.float32, 96)
    together = ops.rms_norm(x, weight, 1e-6)
    for number in range(7):
        assert torch.equal(ops.rms_norm(x[number : number + 1], weight, 1e-6)[0], together[number])


@BOTH
@DTYPES
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(4, 2, 16, 16), (14, 2, 64, 64), (3, 1, 80, 80), (4, 4, 80, 20), (2, 2, 8, 4), (9, 9, 128, 64)],
)
def test_rotary(
    ops: ModuleType, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int
) -> None:
    torch.manual_seed(head_dim)
    projected = normal(dtype, 1, 5, (num_heads + num_kv_heads) * head_dim)  # query and key side by side
    query, key = (
        projected[..., begin * head_dim : end * head_dim].view(1, 5, end - begin, head_dim).transpose(1, 2)
        for begin, end in ((0, num_heads), (num_heads, num_heads + num_kv_heads))
    )
    cos, sin = normal(dtype, 1, 5, rotary_dim), normal(dtype, 1, 5, rotary_dim)  # the halves may differ
    given = projected.clone()
    computed = ops.rotary(query, key, cos, sin)
    assert torch.equal(given, projected), "the input was changed"
    for states, got in zip((query, key), computed, strict=True):
        turned, passed = states.double()[..., :rotary_dim], states.double()[..., rotary_dim:]
        first, second = turned.chunk(2, dim=-1)
        rotated = turned * cos.double() + torch.cat([-second, first], dim=-1) * sin.double()
        assert_close(got, torch.cat([rotated, passed], dim=-1), dtype)
        assert got.transpose(1, 2)[0].stride()[1:] == (head_dim, 1), "not stored token by token"


@DTYPES
@pytest.mark.parametrize("width", [48, 1024, 1100])
@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
def test_gated_activations(name: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    side_by_side = normal(dtype, 1, 5, 2 * width) * 3
    gate, up = side_by_side.chunk(2, dim=-1)
    activated = gate.double() * torch.sigmoid(gate.double())
    if name == "gelu_tanh_mul":
        activated = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    for gates, ups in ((gate, up), (gate.contiguous(), up.contiguous()), (gate[0], up[0])):
        computed = getattr(elementwise, name)(gates, ups)
        assert_close(computed, (activated * up.double()).view(gates.shape), dtype)


def aot_kernels(arch: int) -> list[tuple[AotKernel, int]]:
    """Kernels in the shapes of an 8B model, bfloat16; for each how many loads of what all heads share may be narrow."""

    def pointers(*names: str) -> dict[str, str]:
        return dict.fromkeys((f"{name}_ptr" for name in names), "*bf16")

    def numbers(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "i32")

    states = [f"{name}_{axis}_stride" for name in ("query", "key") for axis in ("batch", "head", "token")]
    angles = [f"{name}_{axis}_stride" for name in ("cos", "sin") for axis in ("batch", "token")]
    norm = AotKernel(
        MODULE,
        "_rms_norm_kernel",
        {
            **pointers("x", "weight", "out"),
            **numbers("num_lines", "inner", "outer_stride", "inner_stride"),
            "eps": "fp32",
        },
        {
            "WIDTH": 4096,
            "BLOCK_WIDTH": 4096,
            "BLOCK_LINES": 1,
            "ADDS_ONE": False,
            "ROUNDS_FIRST": True,
            "UPCAST": False,
        },
        ("outer_stride", "inner_stride"),
        num_warps=8,
        arch=arch,
    )
    of_heads = {**norm.constants, "WIDTH": 128, "BLOCK_WIDTH": 128, "BLOCK_LINES": 8}
    rotary = AotKernel(
        MODULE,
        "_rotary_kernel",
        {**pointers("query", "key", "cos", "sin", "out"), **numbers("num_tokens", *states, *angles)},
        {
            "NUM_HEADS": 32,
            "NUM_KV_HEADS": 8,
            "HEAD_DIM": 128,
            "ROTARY_DIM": 128,
            "BLOCK_HEADS": elementwise.HEADS_PER_PROGRAM,
            "BLOCK_HALF": 64,
            "BLOCK_REST": 1,
        },
        (*states, *angles),
        arch=arch,
    )
    activation = AotKernel(
        MODULE,
        "_activate_and_multiply_kernel",
        {**pointers("gate", "up", "out"), **numbers("width", "gate_stride", "up_stride")},
        {"IS_GELU": False, "BLOCK": elementwise.TILE_VALUES},
        ("width", "gate_stride", "up_stride"),
        arch=arch,
    )
    return [(norm, 0), (replace(norm, constants=of_heads, num_warps=2), 1), (rotary, 0), (activation, 0)]


def test_machine_code_moves_16_bytes_at_a_time() -> None:
    cases = [case for arch in ARCHES for case in aot_kernels(arch)]
    compiled_kernels = compile_all([kernel for kernel, _ in cases])
    for compiled, (kernel, most_narrow) in zip(compiled_kernels, cases, strict=True):
        name = f"{kernel.name} for sm_{kernel.arch}"
        assert compiled.spill_bytes == 0, name
        assert compiled.registers <= 64, f"{name}: {compiled.registers} registers"
        narrow = [compiled.count(rf"{access}\.(?!\S*128)") for access in ("LDG", "STG")]
        assert compiled.count(r"STG\S*\.128"), name
        assert narrow[0] <= most_narrow, f"{name}: {narrow[0]} loads narrower than 16 bytes"
        assert narrow[1] == 0, f"{name}: {narrow[1]} stores narrower than 16 bytes"
