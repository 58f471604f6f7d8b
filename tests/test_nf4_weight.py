"""The NF4 container against bitsandbytes: the same weights in another order, forth and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor

from heddle_kernels.nf4_weight import CELL, CELL_BYTES, Nf4Weight, UnsupportedWeight


def quantise(
    num_rows: int, in_features: int, nested: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, QuantState]:
    """bitsandbytes' own bytes of a random weight, offset so that a nested absmax has a mean worth keeping."""
    generator = torch.Generator().manual_seed(num_rows * in_features)
    weight = torch.randn(num_rows, in_features, generator=generator).to(dtype) * 0.05
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    return packed, state


LAYERS = [(130, True), (77, False), (1, True)]  # rows, doubly quantised: no layer begins or ends on a cell


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantizes_to_the_same_bits(dtype: torch.dtype) -> None:
    layers = [quantise(num_rows, 256, nested, dtype) for num_rows, nested in LAYERS]
    weight = Nf4Weight.from_bitsandbytes(layers, absmax_dtype=torch.float32)
    assert weight.out_features == (130, 77, 1)
    assert weight.dtype == dtype
    assert torch.equal(weight.dequantize(dtype), torch.cat([dequantize_4bit(*layer) for layer in layers]))


@pytest.mark.parametrize("nested", [False, True])
def test_one_layer_of_several_is_that_layer(nested: bool) -> None:
    layers = [quantise(num_rows, 128, nested) for num_rows in (128, 200, 60)]
    weight = Nf4Weight.from_bitsandbytes(layers, absmax_dtype=torch.float32)
    for number, layer in enumerate(layers):
        site = weight.site(number)
        alone = Nf4Weight.from_bitsandbytes([layer], absmax_dtype=torch.float32)
        assert torch.equal(site.dequantize(), alone.dequantize())
        assert site.num_padded_rows == alone.num_padded_rows
    assert weight.site(0).packed.data_ptr() == weight.packed.data_ptr(), "a layer of whole cells is a view"


def test_gives_the_bytes_back_bit_for_bit() -> None:
    layers = [quantise(num_rows, 384, nested) for num_rows, nested in LAYERS]
    returned = Nf4Weight.from_bitsandbytes(layers, absmax_dtype=torch.float32).to_bitsandbytes()
    for (packed, state), (bytes_back, absmax_back) in zip(layers, returned, strict=True):
        assert torch.equal(bytes_back, packed)
        plain = QuantState(absmax_back, state.shape, state.code, 64, "nf4", torch.float32)
        assert torch.equal(dequantize_4bit(bytes_back, plain), dequantize_4bit(packed, state))


def test_half_precision_absmax_is_off_by_one_rounding() -> None:
    layer = quantise(64, 256, nested=True)
    exact, rounded = (Nf4Weight.from_bitsandbytes([layer], dtype) for dtype in (torch.float32, torch.float16))
    error = (rounded.dequantize() - exact.dequantize()).abs()
    assert 0 < (error / exact.dequantize().abs().clamp_min(1e-9)).max() <= 2**-11
    assert rounded.size_bytes == CELL * 256 * (1 / 2 + 2 / 64)
    assert exact.size_bytes == CELL * 256 * (1 / 2 + 4 / 64)


def test_a_byte_lies_where_the_tensor_core_wants_it() -> None:
    """The fragment of NVIDIA's m64k16 first operand, spelt out: which thread holds which weight, and in what order."""
    packed, state = quantise(256, 256)
    weight = Nf4Weight.from_bitsandbytes([(packed, state)])
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).view(256, 256)
    for row, column in torch.randint(256, (200, 2), generator=torch.Generator().manual_seed(3)).tolist():
        cell = weight.packed[row // 128, column // 128]
        r, k = row % 128, column % 64
        warp, lane = r % 64 // 16, r % 8 * 4 + k % 8 // 2
        thread = warp * 32 + lane
        register = (k // 16 % 2, k // 8 % 2, r // 8 % 2)  # step of 16 inputs, upper 8 inputs, upper 8 rows
        within = register[0] * 8 + register[1] * 4 + register[2] * 2 + k % 2
        position = (k // 32 * 2 + r // 64) * 128 * 16 + thread * 16 + within
        assert position < CELL_BYTES
        byte = int(cell[position])
        assert nibbles[row, column] == (byte >> 4 if column % 128 < 64 else byte & 15)


def test_missing_rows_are_zeros() -> None:
    weight = Nf4Weight.from_bitsandbytes([quantise(5, 128)], absmax_dtype=torch.float32)
    assert weight.num_rows == 5
    for absmax in (weight.absmax, torch.ones_like(weight.absmax)):  # by their codes, whatever the absmax
        whole = Nf4Weight(weight.packed, absmax, 128, (weight.num_padded_rows,), weight.dtype)
        assert whole.dequantize()[5:].count_nonzero() == 0
        assert whole.dequantize()[:5].count_nonzero() > 0


def changed(state: QuantState, **fields: Any) -> QuantState:
    other = copy.copy(state)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def test_refuses_what_it_cannot_hold() -> None:
    packed, state = quantise(8, 128)
    refused: dict[str, tuple[Tensor, Any]] = {
        "192 input features are not a multiple": quantise(8, 192),
        "quantised as fp4": quantize_4bit(torch.randn(8, 128), blocksize=64, quant_type="fp4"),
        "128 weights share": quantize_4bit(torch.randn(8, 128), blocksize=128, quant_type="nf4"),
        "reordered for a CPU": (packed, changed(state, packing_format_for_cpu=True)),
        "2 dimensions, not the 3": (packed, changed(state, shape=torch.Size((2, 4, 128)))),
        "512 bytes are not 16 x 128": (packed, changed(state, shape=torch.Size((16, 128)))),
        "quantised from torch.float64": (packed, changed(state, dtype=torch.float64)),
        "16 code values": (packed, changed(state, code=state.code.flip(0))),
        "not a finite number in torch.float16": (packed, changed(state, absmax=state.absmax * 1e9)),
    }
    for reason, layer in refused.items():
        with pytest.raises(UnsupportedWeight, match=reason):
            Nf4Weight.from_bitsandbytes([layer])
    with pytest.raises(UnsupportedWeight, match="must read the same input"):
        Nf4Weight.from_bitsandbytes([(packed, state), quantise(8, 256)])
