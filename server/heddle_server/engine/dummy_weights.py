"""A model with random weights in its own shapes, for measuring how fast a base is without having it.

Nothing of the model's size is ever drawn or quantised: a few million normal numbers are, once, and every weight repeats
them from another place on. So each has the values, scales and bytes of a quantised random matrix, at the price of a
copy.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

SEED = 0
BLOCK = 64  # weights under one scale in bitsandbytes' 4-bit formats
# A prime, and so is NUM_BLOCKS * BLOCK - 1: whatever a matrix's width, its rows begin at different places of the noise
# and no two are equal.
NUM_BLOCKS = 65_657


def make_dummy_model(
    config: Any, quantization: BitsAndBytesConfig | None, dtype: torch.dtype, device: torch.device, attention_name: str
) -> PreTrainedModel:
    """The model that from_pretrained would load and quantise, with random weights. The same ones in every run."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention_name)
    quantizer = None if quantization is None else AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    if quantizer is not None:
        quantizer.preprocess_model(model, dtype=dtype, device_map={"": device})
    model.tie_weights()  # once more: as empty ones, tied weights were taken apart
    noise = Noise(quantization, dtype, device)
    made = dict[nn.Parameter, nn.Parameter]()
    for module in model.modules():
        _fill(module, noise, made)
        if "Norm" in type(module).__name__:
            model._init_weights(module)  # to one, or to zero in families that add the one
    if quantizer is not None:
        quantizer.postprocess_model(model)
    return model


def _fill(module: Any, noise: Noise, made: dict[nn.Parameter, nn.Parameter]) -> None:
    """Give a module of the empty model its own weights. `made` has what each empty one became: tied ones stay tied."""
    if isinstance(module, Linear4bit):
        module.weight = noise.weight_4bit(module)
    elif isinstance(module, Linear8bitLt):
        module.weight = noise.weight_int8(module)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
            if parameter not in made:
                made[parameter] = noise.parameter(parameter, fan_in)
            setattr(module, name, made[parameter])
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(noise.device))


class Noise:
    """Normal numbers as weights of any shape and format, with the standard deviation fan_in ** -0.5.

    So a layer's output is as large as its input, and logits spread over several units.
    """

    def __init__(self, quantization: BitsAndBytesConfig | None, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self._dtype = dtype
        self._quant_type = None if quantization is None else quantization.bnb_4bit_quant_type
        self._generator = torch.Generator().manual_seed(SEED)  # on the CPU: the same numbers on every device
        self._normal = torch.randn(NUM_BLOCKS * BLOCK, generator=self._generator).to(device)

    def parameter(self, like: nn.Parameter, fan_in: int) -> nn.Parameter:
        """An unquantised parameter; a bias is zero."""
        if like.ndim == 1:
            values = torch.zeros(like.shape, dtype=like.dtype, device=self.device)
        else:
            values = _repeated(self._normal[:-1], self._start(), like.numel(), like.dtype)
            values = values.mul_(fan_in**-0.5).view(like.shape)
        return nn.Parameter(values, requires_grad=False)

    def weight_4bit(self, module: Any) -> Params4bit:
        """NF4 or FP4 as bitsandbytes would have packed it."""
        weight = module.weight
        packed, state = self._in_4bit
        start, shape = self._start(), torch.Size((module.out_features, module.in_features))
        values = _repeated(packed, start * BLOCK // 2, -(-shape.numel() // 2))
        absmax = _repeated(state.absmax, start, -(-shape.numel() // BLOCK)).mul_(module.in_features**-0.5)
        scales = _nested(absmax) if weight.compress_statistics else {"absmax": absmax}
        module.quant_state = QuantState(
            shape=shape, dtype=self._dtype, blocksize=BLOCK, code=state.code, quant_type=state.quant_type, **scales
        )
        return Params4bit(
            values[:, None],
            quant_state=module.quant_state,
            blocksize=BLOCK,
            compress_statistics=weight.compress_statistics,
            quant_type=state.quant_type,
            module=module,
            bnb_quantized=True,
        )

    def weight_int8(self, module: Any) -> Int8Params:
        """Eight bits a weight, one scale a row."""
        numbers, largest = self._in_int8
        shape = module.out_features, module.in_features
        values = _repeated(numbers, self._start(), module.out_features * module.in_features).view(shape)
        scales = torch.full(shape[:1], largest * module.in_features**-0.5, device=self.device)
        return Int8Params(values, requires_grad=False, CB=values, SCB=scales)

    @cached_property
    def _in_4bit(self) -> tuple[Tensor, QuantState]:
        """All numbers: bytes [NUM_BLOCKS * BLOCK / 2], and their state with absmax [NUM_BLOCKS]."""
        packed, state = quantize_4bit(self._normal, blocksize=BLOCK, quant_type=self._quant_type)
        return packed.flatten(), state

    @cached_property
    def _in_int8(self) -> tuple[Tensor, float]:
        """All numbers but one: [NUM_BLOCKS * BLOCK - 1], and what 127 stands for."""
        largest = self._normal.abs().max().item()
        return (self._normal[:-1] * (127 / largest)).round().to(torch.int8), largest

    def _start(self) -> int:
        """The block, or the number, where the next weight begins."""
        return int(torch.randint(NUM_BLOCKS, (), generator=self._generator))


def _nested(absmax: Tensor) -> dict[str, Any]:
    """Scales that are quantised themselves, as `quantize_4bit` does it."""
    offset = absmax.mean()
    quantized, state = quantize_blockwise(absmax - offset, blocksize=256)
    return {"absmax": quantized, "offset": offset, "state2": state}


def _repeated(numbers: Tensor, start: int, count: int, dtype: torch.dtype | None = None) -> Tensor:
    """`count` of `numbers` from `start` on, around and around: [count]."""
    values = torch.empty(count, dtype=dtype or numbers.dtype, device=numbers.device)
    num_written = 0
    while num_written < count:
        piece = numbers[start : start + count - num_written]
        values[num_written : num_written + len(piece)] = piece
        num_written += len(piece)
        start = 0
    return values
