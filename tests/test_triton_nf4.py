"""The 4-bit matmul's kernels: against float64 in the interpreter, their assembler emulated, their machine code read."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from numpy.typing import NDArray
from torch import Tensor

from heddle_kernels.nf4_weight import CELL, NF4_CODE, Nf4Weight
from triton_aot import AotKernel, Compiled, compile_all, count

pytest.importorskip("triton")
from heddle_kernels.triton_kernels import nf4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative error in the 2-norm, whatever the shape. The codes are rounded to the activations' dtype: 1.37e-3 in bfloat16
# (bitsandbytes, which rounds code times absmax, has 1.65e-3), 1.9e-4 in float16. For more than 64 tokens a GPU also
# rounds the absmax and the product: 2.54e-3 in bfloat16.
ERROR = {torch.float32: 5e-7, torch.float16: 2.5e-4, torch.bfloat16: 1.7e-3}
ERROR_WEIGHT_SCALED = {torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 3e-3}


def quantised(
    num_rows: tuple[int, ...], in_features: int, absmax_dtype: torch.dtype = torch.float32, nested: bool = True
) -> Nf4Weight:
    generator = torch.Generator().manual_seed(in_features)
    weights = [torch.randn(n, in_features, generator=generator) * 0.05 for n in num_rows]
    layers = [quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested) for w in weights]
    return Nf4Weight.from_bitsandbytes(layers, absmax_dtype).to(DEVICE)


def activations(num_tokens: int, in_features: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, in_features, generator=generator).to(DEVICE, dtype)


def relative_error(actual: Tensor, x: Tensor, weight: Nf4Weight) -> float:
    truth = x.double() @ weight.dequantize().double().T
    return float(((actual.double() - truth).norm() / truth.norm()).nan_to_num(torch.inf))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("absmax_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 33, 128])
def test_multiplies_like_the_dequantised_weight(num_tokens: int, absmax_dtype: torch.dtype, dtype: torch.dtype) -> None:
    weight = quantised((130, 30), 256, absmax_dtype, nested=num_tokens != 5)
    x = activations(num_tokens, 256, dtype)
    workspace = nf4.nf4_gemm(x, weight)
    assert workspace.shape == (2, num_tokens, 256)
    allowed = (ERROR if num_tokens <= 64 else ERROR_WEIGHT_SCALED)[dtype]
    assert relative_error(workspace.sum(0)[:, :160], x, weight) <= allowed


@pytest.mark.parametrize(("in_features", "splits"), [(128, 1), (640, 5), (21 * CELL, 11)], ids=str)
def test_every_split_sums_its_own_part(in_features: int, splits: int) -> None:
    """One step, one step each, and two steps each with one left over for the last."""
    weight = quantised((40,), in_features)
    x = activations(3, in_features, torch.float32)
    workspace = nf4.nf4_gemm(x, weight)
    assert workspace.shape == (splits, 3, CELL)
    assert relative_error(workspace.sum(0)[:, :40], x, weight) <= ERROR[torch.float32]
    inputs_per_split = -(-(in_features // CELL) // splits) * CELL
    for split, part in enumerate(workspace):
        here = slice(split * inputs_per_split, (split + 1) * inputs_per_split)
        truth = x[:, here].double() @ weight.dequantize()[:, here].double().T
        assert torch.allclose(part[:, :40].double(), truth, atol=1e-5)


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(5, 130), (40, 300)])
def test_writes_the_whole_workspace_and_nothing_else(num_tokens: int, num_rows: int) -> None:
    """Also where a tile of 256 rows reaches below the 384 that there are."""
    weight = quantised((num_rows,), 256)
    x = activations(num_tokens, 256, torch.float32)
    around = torch.full((4, num_tokens, weight.num_padded_rows), torch.nan, device=DEVICE)
    workspace = nf4.nf4_gemm(x, weight, around[1:3])
    assert relative_error(workspace.sum(0)[:, :num_rows], x, weight) <= ERROR[torch.float32]
    assert workspace[:, :, num_rows:].count_nonzero() == 0, "rows that do not exist are zeros"
    assert around[[0, 3]].isnan().all()


def test_no_token_touches_its_neighbours() -> None:
    weight = quantised((64,), 256)
    x = activations(18, 256, torch.float32)
    spoilt = torch.full((18, 2 * 256), torch.nan, device=DEVICE)[:, :256]  # rows with a gap between them
    spoilt[:7], spoilt[8:] = x[:7], x[8:]
    actual, expected = nf4.nf4_gemm(spoilt, weight).sum(0), nf4.nf4_gemm(x, weight).sum(0)
    others = [token for token in range(18) if token != 7]
    assert torch.equal(actual[others], expected[others])
    assert actual[7, :64].isnan().all()


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_reduce_adds_splits_and_bias(has_bias: bool, dtype: torch.dtype) -> None:
    num_rows = nf4.REDUCE_BLOCK + 77
    generator = torch.Generator().manual_seed(1)
    workspace = torch.randn(3, 5, nf4.REDUCE_BLOCK + CELL, generator=generator).to(DEVICE)
    bias = torch.randn(num_rows, generator=generator).to(DEVICE, dtype) if has_bias else None
    out = torch.full((5, num_rows + 3), torch.nan, device=DEVICE, dtype=dtype)
    nf4.reduce(workspace, bias, out[:, :num_rows])
    truth = workspace[:, :, :num_rows].double().sum(0) + (0 if bias is None else bias.double())
    # one rounding to the output's dtype; the interpreter cuts bfloat16 off instead, which is up to twice that
    unit = {torch.float32: 2e-7, torch.float16: 2**-11, torch.bfloat16: 2**-7}[dtype]
    assert ((out[:, :num_rows].double() - truth).abs() <= unit * truth.abs() + 1e-6).all()
    assert out[:, num_rows:].isnan().all()


@pytest.mark.parametrize("nested", [False, True])
def test_writes_the_weights_out_to_the_bit(nested: bool) -> None:
    layer = quantize_4bit(torch.randn(77, 384), blocksize=64, quant_type="nf4", compress_statistics=nested)
    weight = Nf4Weight.from_bitsandbytes([layer], torch.float32).to(DEVICE)
    buffer = torch.full((77 * 384 + 9,), torch.nan, device=DEVICE)  # larger than this layer needs
    assert torch.equal(nf4.dequantize(weight, buffer), dequantize_4bit(*layer).to(DEVICE))
    assert buffer[77 * 384 :].isnan().all()
    half = nf4.dequantize(weight, buffer.half())
    assert torch.equal(half, weight.dequantize(torch.float16))


def test_refuses_what_no_tile_holds() -> None:
    weight = quantised((8,), 128)
    for x in (torch.ones(0, 128), torch.ones(129, 128), torch.ones(4, 256), torch.ones(128, 4).T):
        with pytest.raises(ValueError, match="is not 1 to 128 rows of 128"):
            nf4.nf4_gemm(x.to(DEVICE), weight)
    assert nf4.supports(weight, torch.bfloat16) is None
    assert "float64" in str(nf4.supports(weight, torch.float64))


def test_splits_leave_no_program_without_work() -> None:
    for num_rows in (1, 128, 1152, 4096, 6144, 28672, 151936):
        for num_steps in (1, 2, 7, 28, 32, 38, 112, 216):
            splits = nf4.splits_for(num_steps * CELL, num_rows)
            steps = -(-num_steps // splits)
            assert 1 <= splits <= nf4.MAX_SPLITS
            assert (splits - 1) * steps < num_steps <= splits * steps


@pytest.mark.parametrize(
    ("in_features", "num_rows"), [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)], ids=str
)
def test_splits_give_every_processor_work(in_features: int, num_rows: int) -> None:
    """The layers of an 8B Llama: about two to four programs a processor, all resident at once."""
    programs = -(-num_rows // CELL) * nf4.splits_for(in_features, num_rows)
    assert 1.9 * nf4.PROCESSORS <= programs <= 4 * nf4.PROCESSORS


# The assembler, run by a small emulator: every register is an array [num_warps, 32] of what its lanes hold.

Lanes = NDArray[np.uint32]


def permute_bytes(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """PTX prmt: byte i of the result is the byte of (a, b) that nibble i of the selector names."""
    source = np.stack([a >> shift & 0xFF for shift in (0, 8, 16, 24)] + [b >> shift & 0xFF for shift in (0, 8, 16, 24)])
    chosen = [np.take_along_axis(source, (selector >> 4 * i & 7)[None].astype(np.int64), 0)[0] for i in range(4)]
    return sum((byte << np.uint32(8 * i) for i, byte in enumerate(chosen)), np.zeros_like(a))


def emulate(asm: str, registers: dict[str, Lanes]) -> None:
    """Run PTX of the few kinds that decoding uses, changing `registers`."""
    registers["%laneid"] = np.broadcast_to(np.arange(32, dtype=np.uint32), next(iter(registers.values())).shape)

    def value(operand: str) -> Lanes:
        return registers[operand] if operand in registers else np.full_like(registers["%laneid"], int(operand, 0))

    for line in asm.strip("{} ").split(";"):
        if not (match := re.match(r"\s*(?:@(\w+) )?(\S+) (.*)", line)) or match[2] == ".reg":
            continue
        predicate, name, (target, *operands) = match[1], match[2], match[3].split(", ")
        inputs = [value(operand) for operand in operands if operand != "-1"]
        match name:
            case "mov.b32" | "mov.u32":
                result = inputs[0]
            case "and.b32":
                result = inputs[0] & inputs[1]
            case "shr.u32":
                result = inputs[0] >> inputs[1]
            case "setp.eq.u32":
                result = (inputs[0] == inputs[1]).astype(np.uint32)
            case "prmt.b32":
                result = permute_bytes(*inputs)
            case "shfl.sync.idx.b32":
                assert operands[2:] == ["31", "-1"], "all 32 lanes, as one segment"
                result = np.take_along_axis(inputs[0], (inputs[1] & 31).astype(np.int64), axis=1)
            case _:
                raise AssertionError(f"unknown instruction {name}")
        registers[target] = result if predicate is None else np.where(registers[predicate] == 1, result, value(target))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_the_assembler_decodes_every_nibble(dtype: torch.dtype) -> None:
    """Four neighbouring bytes in one register, the first in its lowest bits: the codes of high, then of low nibbles."""
    words = np.random.default_rng(5).integers(0, 2**32, (2000, 32), dtype=np.uint32)
    lane = {"$0": np.zeros_like(words)}
    emulate(nf4._lane_code_asm(dtype), lane)
    is_wide = dtype == torch.float32
    registers = {"$8" if is_wide else "$4": words, "$9" if is_wide else "$5": lane["$0"]}
    emulate(nf4._decode_asm(dtype), registers)
    outputs = np.stack([registers[f"${i}"] for i in range(8 if is_wide else 4)], axis=-1)  # [2000, 32, registers]
    decoded = torch.from_numpy(outputs.copy().view(np.int32 if is_wide else np.int16)).view(dtype)
    packed = words[..., None].view(np.uint8).astype(np.int64)  # [2000, 32, 4]
    expected = torch.tensor(NF4_CODE).to(dtype)[torch.from_numpy(np.concatenate([packed >> 4, packed & 15], axis=-1))]
    assert torch.equal(decoded, expected)


# Machine code, compiled here without a GPU.

MODULE = "heddle_kernels.triton_kernels.nf4"
TRITON_TYPE = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def gemm(arch: int, num_tokens: int, dtype: torch.dtype, absmax_dtype: torch.dtype = torch.float16) -> AotKernel:
    """The configuration that `nf4_gemm` launches for this many tokens on this GPU."""
    shape = nf4.tile_shape_for(num_tokens, dtype, has_wgmma=arch == 90)
    signature = {"x_ptr": TRITON_TYPE[dtype], "packed_ptr": "*u8", "absmax_ptr": TRITON_TYPE[absmax_dtype]}
    signature["workspace_ptr"] = "*fp32"
    numbers = ("num_tokens", "x_stride", "num_steps", "steps_per_split", "num_padded_rows")
    return AotKernel(
        MODULE,
        "_nf4_gemm_kernel",
        signature | dict.fromkeys(numbers, "i32"),
        {"TOKENS": shape.tokens, "ROW_CELLS": shape.row_cells, "SCALE": shape.scale, "DECODE": "shfl", "UPCAST": False},
        divisible_by_16=("x_stride", "num_padded_rows"),
        num_warps=shape.num_warps,
        num_stages=nf4.NUM_STAGES,
        arch=arch,
    )


# (GPU, tokens, activations, absmax) -> most registers a thread, most instructions of the main loop per weight, as
# Triton 3.7.1 and 3.6.0 compile them, with a little room. 168 registers let three programs of four warps share a
# processor, 255 one of eight. An H200 at 4.3 TB/s must decode 29 weights a clock and processor, which issues 128
# lanes: at 4.4 instructions a weight that alone would take as long as the memory.
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LIMITS: dict[tuple[int, int, torch.dtype, torch.dtype], tuple[int, float]] = {
    (90, 16, BF16, FP16): (136, 3.8),
    (90, 16, BF16, FP32): (136, 3.8),
    (90, 32, BF16, FP16): (168, 4.1),
    (90, 64, BF16, FP16): (255, 4.6),
    (90, 128, BF16, FP16): (255, 4.2),
    (90, 128, FP16, FP32): (255, 4.2),
    (90, 128, FP32, FP16): (176, 23.0),  # without tensor cores
    (80, 16, BF16, FP16): (136, 5.8),
    (80, 32, BF16, FP16): (208, 6.9),
    (80, 64, BF16, FP16): (184, 10.0),
    (80, 128, BF16, FP16): (184, 13.5),
    (89, 16, BF16, FP16): (136, 5.8),
    (89, 32, BF16, FP16): (208, 6.9),
    (89, 64, BF16, FP16): (184, 10.0),
    (89, 128, BF16, FP16): (184, 13.5),
}
DEQUANTIZE = [
    AotKernel(
        MODULE,
        "_dequantize_kernel",
        {"packed_ptr": "*u8", "absmax_ptr": "*fp16", "out_ptr": "*bf16", "num_rows": "i32", "num_steps": "i32"},
        {"DECODE": "shfl"},
        arch=arch,
    )
    for arch in (80, 90)
]


@pytest.fixture(scope="module")
def machine_code() -> dict[object, Compiled]:
    """Everything this file reads, compiled in one go."""
    keys = list(LIMITS)
    kernels = [gemm(*key) for key in keys]
    return dict(
        zip([*keys, *(kernel.arch for kernel in DEQUANTIZE)], compile_all([*kernels, *DEQUANTIZE]), strict=True)
    )


@pytest.mark.parametrize("key", LIMITS, ids=lambda key: "-".join(map(str, key)))
def test_machine_code(key: tuple[int, int, torch.dtype, torch.dtype], machine_code: dict[object, Compiled]) -> None:
    arch, _, dtype, _ = key
    compiled = machine_code[key]
    loop = compiled.loop_with("SHFL")
    row_cells = int(str(compiled.kernel.constants["ROW_CELLS"]))
    weights_per_thread = row_cells * CELL * CELL // (32 * compiled.kernel.num_warps)
    max_registers, max_instructions = LIMITS[key]
    assert compiled.registers <= max_registers
    assert compiled.spill_bytes == 0
    assert len(loop) / weights_per_thread <= max_instructions
    assert count(loop, r"SHFL\.IDX") >= weights_per_thread, "a table lookup is one shuffle"
    if dtype == FP32:
        return  # its sums are ordinary multiplications
    assert count(loop, "HGMMA" if arch == 90 else "HMMA") > 0
    packed_loads = weights_per_thread // 2 // 16
    assert count(loop, r"LDGSTS\S*\.128") >= packed_loads, "packed weights travel 16 bytes at a time"
    assert count(loop, r"LDS\.128") == packed_loads
    if arch == 90:
        assert count(loop, r"SHFL\.IDX") == weights_per_thread, "the decoded weights lie where wgmma takes them"
        assert count(loop, "STS") == 0, "nothing is exchanged through shared memory"
        assert count(loop, "BAR") <= 2, "one for the arriving cell, one before its room is used again"


@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code_of_dequantize(arch: int, machine_code: dict[object, Compiled]) -> None:
    compiled = machine_code[arch]
    assert compiled.registers <= 128
    assert compiled.spill_bytes == 0
    assert compiled.count("SHFL") == CELL * CELL // 128
    assert compiled.count(r"LDG\S*\.128") == 4
    assert compiled.count(r"STG\S*\.128") == 16
