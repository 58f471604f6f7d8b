"""The CPU's product with NF4 weights, on vectors and on tiles, against bitsandbytes' weights written out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor

pytest.importorskip("numba")

from heddle_kernels.cpu_kernels import nf4_linear
from heddle_kernels.cpu_kernels.nf4_linear import CpuNf4Linear
from heddle_kernels.cpu_kernels.nf4_panels import BLOCK_BYTES, Nf4Panels
from heddle_kernels.cpu_kernels.ops import CpuOps
from heddle_kernels.cpu_kernels.tiles import has_tiles
from heddle_kernels.cpu_kernels.vectors import has_bfloat16_products
from heddle_kernels.dense_buffer import DenseBuffer
from heddle_kernels.nf4_weight import NF4_CODE, UnsupportedWeight
from heddle_server.engine.base_linear import BaseLinears, DenseForMany

SHAPES = [(16, 64), (1, 128), (100, 192), (130, 64), (257, 320)]  # out_features, in_features
TOKENS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 65, 100, 130)
NEVER, ALWAYS = 10**6, 0  # tokens from which on tiles are used


@pytest.fixture(params=["vectors", "tiles"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways for any number of tokens."""
    if not has_bfloat16_products():
        pytest.skip("this processor does not multiply bfloat16")
    if request.param == "tiles" and not has_tiles():
        pytest.skip("this processor has no bfloat16 tiles")
    monkeypatch.setattr(nf4_linear, "TILES_FROM_TOKENS", ALWAYS if request.param == "tiles" else NEVER)
    return str(request.param)


def quantise(out_features: int, in_features: int, nested: bool = False) -> tuple[Tensor, QuantState]:
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    packed, state = quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=nested)
    return packed, state


def linear_of(packed: Tensor, state: QuantState, bias: Tensor | None = None) -> CpuNf4Linear:
    return CpuNf4Linear(Nf4Panels.from_bitsandbytes(packed, state), bias, DenseBuffer())


def rounded_codes(packed: Tensor, state: QuantState) -> Tensor:
    """The weights in float64, of codes rounded to bfloat16: what the product multiplies with, but for its sums."""
    plain = QuantState(torch.ones_like(state.absmax), state.shape, state.code, 64, "nf4", torch.float32)
    codes = dequantize_4bit(packed, plain).bfloat16().double()
    blocks = codes.view(*codes.shape[:1], -1, 64) * state.absmax.double().view(len(codes), -1, 1)
    weight: Tensor = blocks.view(codes.shape)
    return weight


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_within_its_rounding(shape: tuple[int, int]) -> None:
    """bfloat16 keeps 8 bits of an output; the sums before it are float32's."""
    packed, state = quantise(*shape)
    bias = torch.randn(shape[0]).bfloat16()
    linear, weight = linear_of(packed, state, bias), rounded_codes(packed, state)
    for num_tokens in TOKENS:
        x = torch.randn(num_tokens, shape[1]).bfloat16()
        expected = x.double() @ weight.T + bias.double()
        terms = x.double().abs() @ weight.abs().T + bias.double().abs()
        error = (linear(x).double() - expected).abs()
        assert (error <= 2**-8 * expected.abs() + 2**-20 * terms).all(), f"{num_tokens} tokens"


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("nested", [False, True])
def test_is_as_accurate_as_weights_written_out(nested: bool) -> None:
    """Beside the exact product of the 4-bit weights: not further off than a bfloat16 layer over them."""
    packed, state = quantise(256, 512, nested)
    exact, x = dequantize_4bit(packed, state), torch.randn(64, 512).bfloat16()
    truth = x.double() @ _in_float64(packed, state).T

    def error_of(y: Tensor) -> float:
        return float((y.double() - truth).norm() / truth.norm())

    assert error_of(linear_of(packed, state)(x)) <= 1.1 * error_of(x @ exact.T)


def _in_float64(packed: Tensor, state: QuantState) -> Tensor:
    wide = QuantState(
        state.absmax, state.shape, state.code, 64, "nf4", torch.float32, offset=state.offset, state2=state.state2
    )
    weight: Tensor = dequantize_4bit(packed, wide).double()
    return weight


@pytest.mark.usefixtures("instructions")
def test_neighbours_and_threads_change_no_bit(num_torch_threads: Callable[[int], None]) -> None:
    packed, state = quantise(300, 320)
    linear, x = linear_of(packed, state), torch.randn(100, 320).bfloat16()
    whole = linear(x)
    for num_threads in (1, 2, 3):
        num_torch_threads(num_threads)
        assert torch.equal(linear(x), whole)
        for begin, end in ((0, 33), (33, 50), (50, 100)):
            assert torch.equal(linear(x[begin:end]), whole[begin:end])


@pytest.mark.usefixtures("instructions")
def test_what_is_not_a_number_stays_with_its_token() -> None:
    linear, x = linear_of(*quantise(64, 128)), torch.ones(20, 128).bfloat16()
    x[3, 5], x[17, 0] = torch.nan, torch.inf
    y = linear(x)
    assert y[3].isnan().all()
    assert not y[17].isfinite().any()
    assert y[[0, 2, 4, 16, 18, 19]].isfinite().all()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_another_dtype_is_rounded_first(dtype: torch.dtype) -> None:
    linear, x = linear_of(*quantise(48, 64)), torch.randn(5, 64).to(dtype)
    assert torch.equal(linear(x), linear(x.bfloat16()).to(dtype))


@pytest.mark.usefixtures("instructions")
def test_reads_any_view_and_keeps_leading_dimensions() -> None:
    linear, x = linear_of(*quantise(48, 64)), torch.randn(3, 5, 128).bfloat16()
    assert torch.equal(linear(x[..., 64:]), linear(x[..., 64:].contiguous().view(15, 64)).view(3, 5, 48))
    assert linear(x[:0, :, :64]).shape == (0, 5, 48)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_writes_out_the_same_bits_as_bitsandbytes(shape: tuple[int, int], nested: bool) -> None:
    packed, state = quantise(*shape, nested)
    assert torch.equal(linear_of(packed, state).write_out(), dequantize_4bit(packed, state))


def test_panels_hold_every_code_once() -> None:
    packed, state = quantise(100, 192)
    panels = Nf4Panels.from_bitsandbytes(packed, state)
    assert panels.memory.shape == (7, 3, BLOCK_BYTES)
    assert panels.size_bytes == 7 * 3 * (512 + 64)
    nibbles = panels.memory[..., :512]
    in_panels = torch.bincount(torch.cat([(nibbles & 15).flatten(), (nibbles >> 4).flatten()]).int(), minlength=16)
    given = torch.bincount(torch.cat([(packed & 15).flatten(), (packed >> 4).flatten()]).int(), minlength=16)
    given[NF4_CODE.index(0.0)] += (7 * 16 - 100) * 192
    assert torch.equal(in_panels, given)


def linear4bit(out_features: int, in_features: int, quant_type: str = "nf4") -> Linear4bit:
    linear = Linear4bit(in_features, out_features, bias=True, compute_dtype=torch.bfloat16, quant_type=quant_type)
    weight = torch.randn(out_features, in_features) * 0.05
    linear.weight = Params4bit(weight, requires_grad=False, quant_type=quant_type, module=linear)
    return linear.to("cpu").eval()


@pytest.mark.parametrize(
    ("out_features", "in_features", "quant_type", "dtype", "reason"),
    [
        (50, 96, "nf4", torch.bfloat16, "96 input features are not a multiple of 64"),
        (64, 128, "fp4", torch.bfloat16, "quantised as fp4, not nf4"),
        (64, 128, "nf4", torch.float32, "computes in bfloat16, not in torch.float32"),
    ],
)
def test_what_it_does_not_take_is_left_to_bitsandbytes_with_one_line(
    out_features: int,
    in_features: int,
    quant_type: str,
    dtype: torch.dtype,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not has_bfloat16_products():
        reason = "computes in bfloat16" if dtype != torch.bfloat16 else "does not multiply bfloat16"
    linears = [linear4bit(out_features, in_features, quant_type) for _ in range(2)]
    x = torch.randn(4, in_features).to(dtype)
    weight = dequantize_4bit(linears[0].weight.data, linears[0].weight.quant_state).float()
    bias: Any = linears[0].bias
    expected = x.float() @ weight.T + bias.float()
    base = BaseLinears(CpuOps(), dtype, keep_dense=False)
    with caplog.at_level(logging.INFO, logger="heddle_server"):
        made = [base.make(linear) for linear in linears]
        base.finish()
    left = [record.getMessage() for record in caplog.records if "bitsandbytes computes" in record.getMessage()]
    assert len(left) == 1
    assert reason in left[0]
    assert "2 linears" in left[0]
    assert (made[0](x).float() - expected).norm() <= 0.02 * expected.norm()


def test_says_what_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heddle_kernels.cpu_kernels.ops.has_bfloat16_products", lambda: False)
    with pytest.raises(UnsupportedWeight, match="AVX512-BF16"):
        CpuOps().nf4_linear(*quantise(16, 64), None, torch.bfloat16)


@pytest.mark.usefixtures("instructions")
def test_the_base_is_computed_by_it_and_written_out_for_many() -> None:
    linear = linear4bit(128, 192)
    weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    base = BaseLinears(CpuOps(), torch.bfloat16, keep_dense=False)
    made: Any = base.make(linear)
    base.finish()
    assert isinstance(made, DenseForMany)
    assert isinstance(made.quantised, CpuNf4Linear)
    for num_tokens in (1, 600):  # more than the largest crossover
        x = torch.randn(num_tokens, 192).bfloat16()
        expected = x.float() @ weight.T + linear.bias.float()
        assert (made(x).float() - expected).norm() <= 0.01 * expected.norm()
