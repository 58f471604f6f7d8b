"""The base's weights, as they were quantised, in a file beside the store: for methods whose rows depend on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from heddle_adapters.base_file import (
    SUFFIX,
    UNFINISHED_SUFFIX,
    BaseFile,
    Encoding,
    StoredWeight,
    WeightArrays,
    base_file_path,
    encoded_floats,
    write_base_file,
)
from heddle_adapters.canonical import Floats
from heddle_adapters.errors import StoreUnusable
from heddle_adapters.store_folder import make_store_folder
from heddle_server.engine.joined_linear import block_scales, unnested_state
from heddle_server.engine.model_loader import LoadedModel
from heddle_server.engine.places import norms_of
from heddle_server.engine.probe import linears_of

logger = logging.getLogger(__name__)

ENCODINGS: dict[torch.dtype, Encoding] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def keep_base_weights(loaded: LoadedModel, store_path: Path) -> None:
    """Write the file unless it is there, and remove those of other bases. Before anything is woven or repacked.

    Without it the server works, but for the adapters whose compilation asks for the base.
    """
    path = base_file_path(store_path, loaded.fingerprint, str(loaded.dtype).removeprefix("torch."))
    for other in path.parent.glob("*"):
        if other != path and other.suffix in (SUFFIX, UNFINISHED_SUFFIX):
            with suppress(OSError):
                other.unlink()
    with suppress(StoreUnusable):  # missing, or damaged
        BaseFile(path)
        return
    started = time.monotonic()
    try:
        make_store_folder(store_path)
        write_base_file(path, list(_weights(loaded)))
    except OSError as error:
        logger.warning(
            "the base's weights cannot be kept beside the store (%s): adapters that are computed from them, such as "
            "DoRA, will be refused",
            error.strerror or error,
        )
        return
    size_mib, seconds = path.stat().st_size / 2**20, time.monotonic() - started
    logger.info("the base's weights for adapters that are computed from them: %.0f MiB, %.1f s", size_mib, seconds)


def _weights(loaded: LoadedModel) -> Iterator[WeightArrays]:
    model = loaded.model
    for path, linear in linears_of(model):
        yield _weight(path, linear)
    for path, norm in norms_of(model):
        yield _weight(path, norm)
    yield _weight(loaded.places.embedding, model.get_input_embeddings())


def _weight(path: str, module: Any) -> WeightArrays:
    bias = b"" if getattr(module, "bias", None) is None else encoded_floats(module.bias.detach().float().cpu().numpy())
    if isinstance(module, Linear4bit):
        return _four_bit(path, module, bias)
    if isinstance(module, Linear8bitLt):
        stored = StoredWeight(path, "int8", tuple(module.weight.shape), bias=bias)
        return WeightArrays(stored, lambda: (_on_host(module.weight.data), _on_host(module.weight.SCB.float())))
    weight: Tensor = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
    if weight.dtype not in ENCODINGS:
        weight = weight.float()
    stored = StoredWeight(path, ENCODINGS[weight.dtype], tuple(weight.shape), bias=bias)
    return WeightArrays(stored, lambda: (_on_host(weight), None))


def _four_bit(path: str, module: nn.Module, bias: bytes) -> WeightArrays:
    weight: Any = module.weight
    state = weight.quant_state
    if state.shape[1] % state.blocksize:  # bitsandbytes reads such rows in another way on a CPU than on a GPU
        plain = StoredWeight(path, "float32", tuple(state.shape), bias=bias)
        return WeightArrays(
            plain, lambda: (_on_host(bnb.dequantize_4bit(weight.data, unnested_state(state)).float()), None)
        )
    stored = StoredWeight(
        path,
        "4bit",
        tuple(state.shape),
        block_size=state.blocksize,
        levels=tuple(state.code.float().tolist()),
        bias=bias,
    )

    def read() -> tuple[NDArray[Any], Floats]:
        return _on_host(weight.data.view(-1)), _on_host(block_scales(state))

    return WeightArrays(stored, read)


def _on_host(tensor: Tensor) -> NDArray[Any]:
    """In memory, row after row; bfloat16 as 16-bit integers."""
    tensor = tensor.contiguous().cpu()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
