"""The compiled norms, rotations and gated activations of a CPU against transformers' own modules."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

pytest.importorskip("numba")

import numpy as np

from heddle_kernels.cpu_kernels import elementwise
from heddle_kernels.cpu_kernels.bits import as_stored, compiled, narrow, widen
from heddle_kernels.cpu_kernels.exponential import exp, gelu_tanh, silu, tanh
from tolerances import OPERATION

EPS = 1e-6


def close(actual: Tensor, expected: Tensor) -> bool:
    """Of one dtype and shape, and equal: in bfloat16 bit for bit, but where a float32 rounding tips the last one."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    highest = expected.double().abs().max()
    if actual.dtype == torch.bfloat16:  # values that are nothing beside the largest are where formulas may differ
        differs = (actual != expected) & (expected.double().abs() > 1e-3 * highest)
        assert differs.sum() <= max(2, 0.01 * actual.numel()), "another order of roundings"
    return bool((actual.double() - expected.double()).abs().max() <= OPERATION[actual.dtype] * highest)


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize(
    ("module", "form"),
    [
        (modeling_llama.LlamaRMSNorm, {}),
        (Olmo2RMSNorm, {"rounds_first": False}),
        (Gemma2RMSNorm, {"adds_one": True, "rounds_first": False}),
    ],
)
@pytest.mark.parametrize("width", [6, 64, 896])
@torch.no_grad()
def test_rms_norm(module: Callable[..., nn.Module], form: dict[str, bool], width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = module(width, eps=EPS).to(dtype)
    norm.weight.copy_(torch.randn(width))  # type: ignore[operator]
    x = (3 * torch.randn(2, 7, width)).to(dtype)
    assert close(elementwise.rms_norm(x, norm.weight, EPS, **form), norm(x))  # type: ignore[arg-type]
    heads = torch.randn(1, 5, 4, 2 * width).to(dtype)[..., :width]  # a norm of every head, in a longer row
    assert close(elementwise.rms_norm(heads, norm.weight, EPS, **form), norm(heads))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize("rotary_dim", [4, 16, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotary(batch: int, rotary_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angles = torch.randn(batch, 5, rotary_dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    query, key = (torch.randn(batch, 5, heads, 64).to(dtype).transpose(1, 2) for heads in (4, 2))
    original = modeling_gpt_neox if rotary_dim < 64 else modeling_llama
    rotated = [states[..., :rotary_dim] for states in (query, key)]
    expected = original.apply_rotary_pos_emb(*rotated, cos, sin)
    for states, ours, theirs in zip((query, key), elementwise.rotary(query, key, cos, sin), expected, strict=True):
        assert close(ours[..., :rotary_dim], theirs)
        assert torch.equal(ours[..., rotary_dim:], states[..., rotary_dim:])
        assert ours.transpose(1, 2).is_contiguous()  # as attention wants it


def test_rotary_of_positions_shared_by_a_batch() -> None:
    query, key = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 5, 8)
    angles = torch.randn(1, 5, 4).repeat(1, 1, 2)
    expected = modeling_llama.apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    for ours, theirs in zip(elementwise.rotary(query, key, angles.cos(), angles.sin()), expected, strict=True):
        assert close(ours, theirs)


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
def test_gates_by_gelu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (4 * torch.randn(1, 7, 2 * 48)).to(dtype).chunk(2, dim=-1)
    expected = functional.gelu(gate, approximate="tanh") * up
    assert close(elementwise.gelu_tanh_mul(gate, up), expected)
    assert close(elementwise.gelu_tanh_mul(gate.contiguous(), up.contiguous()), expected)
    turned = gate.transpose(1, 2).contiguous().transpose(1, 2)
    assert close(elementwise.gelu_tanh_mul(turned, up), expected)
    assert elementwise.gelu_tanh_mul(gate[:, :0], up[:, :0]).shape == (1, 0, 48)


def test_compiles_where_no_cache_can_be_kept() -> None:
    """numba finds no place for the cache of a function without a file; so it is where no folder can be written."""
    code = (lambda x: 2 * x).__code__.replace(co_filename="<nowhere>")
    assert compiled(FunctionType(code, {}))(21) == 42


@compiled
def _round_trip(values: object, stored: object, back: object) -> None:
    for k in range(values.shape[0]):  # type: ignore[attr-defined]
        stored[k] = narrow(values[k], stored[k])  # type: ignore[index]
        back[k] = widen(stored[k])  # type: ignore[index]


@compiled
def _functions(x: object, out: object) -> None:
    for k in range(x.shape[0]):  # type: ignore[attr-defined]
        out[0, k], out[1, k] = exp(x[k]), tanh(x[k])  # type: ignore[index]
        out[2, k], out[3, k] = silu(x[k]), gelu_tanh(x[k])  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_and_widens_as_torch(dtype: torch.dtype) -> None:
    """A million random bit patterns: ordinary, tiny, infinite and undefined numbers."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1_000_000,), dtype=torch.int32, generator=generator)
    values = torch.cat([bits.view(torch.float32), torch.tensor([torch.inf, -torch.inf, torch.nan, 65520.0, 3.4e38])])
    stored, back = torch.empty_like(values, dtype=dtype), torch.empty_like(values)
    _round_trip(values.numpy(), as_stored(stored), back.numpy())
    assert torch.equal(stored.isnan(), values.isnan())
    number = ~values.isnan()
    assert torch.equal(stored[number], values.to(dtype)[number])
    assert torch.equal(back[number], values.to(dtype).float()[number])


def test_exponential_and_its_kin() -> None:
    x = torch.cat([torch.linspace(-80, 80, 100_001), torch.linspace(-1e-3, 1e-3, 1001)])
    out = np.empty((4, len(x)), np.float32)
    _functions(x.numpy(), out)
    exact = x.double()
    # torch's own gelu takes a tanh off one, which loses the small values even in float64; this is the same function
    gelu = exact * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3))
    expected = [exact.exp(), exact.tanh(), functional.silu(exact), gelu]
    # gelu's argument of the exponential is a cube, so its own rounding shows where the result is next to nothing
    for values, truth, limit in zip(torch.from_numpy(out).double(), expected, [5e-7, 5e-7, 5e-7, 2e-5], strict=True):
        counts = truth.abs() > 1e-30
        assert ((values - truth).abs() / truth.abs())[counts].max() <= limit


def test_undefined_numbers_stay_so() -> None:
    x = torch.tensor([torch.nan, torch.inf, 1.0])
    out = np.empty((4, 3), np.float32)
    _functions(x.numpy(), out)
    assert np.isnan(out[:, 0]).all()
    assert np.isinf(out[2:, 1]).all()
