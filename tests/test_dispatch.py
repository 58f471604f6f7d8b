"""Which kernels run: the fastest that can, plain torch with the reason, or an error where one was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heddle_kernels import dispatch
from heddle_kernels.dispatch import BackendUnavailable, select_kernels
from heddle_server.config import ConfigError
from test_families import make_engine
from tiny_models import save_tiny_model

CPU = torch.device("cpu")


def absent(missing: str) -> Callable[[str], object]:
    return lambda name: None if name == missing else object()


def test_a_cpu_gets_the_compiled_kernels() -> None:
    kernels = select_kernels(CPU, torch.bfloat16)
    assert kernels.name == "compiled"
    assert kernels.reason == "the fastest for cpu"


def test_without_numba_plain_torch_computes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", absent("numba"))
    kernels = select_kernels(CPU, torch.bfloat16)
    assert kernels.name == "reference"
    assert "numba is not installed (pip install 'heddle[cpu]')" in kernels.reason
    with pytest.raises(BackendUnavailable, match="'compiled' cannot run here: numba is not installed"):
        select_kernels(CPU, torch.bfloat16, "compiled")


def test_a_dtype_that_kernels_do_not_take_falls_back() -> None:
    kernels = select_kernels(CPU, torch.float64)
    assert kernels.name == "reference"
    assert "torch.float64 is none of" in kernels.reason


def test_triton_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from heddle_kernels.triton_kernels import ops

    monkeypatch.setattr(ops, "INTERPRETED", False)
    with pytest.raises(BackendUnavailable, match="'triton' cannot run here: Triton compiles for GPUs, not for cpu"):
        select_kernels(CPU, torch.bfloat16, "triton")
    monkeypatch.setattr(dispatch, "find_spec", absent("triton"))
    with pytest.raises(BackendUnavailable, match="triton is not installed"):
        select_kernels(CPU, torch.bfloat16, "triton")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendUnavailable, match="'cuda' does not exist; choose one of auto, reference, compiled"):
        select_kernels(CPU, torch.bfloat16, "cuda")


def test_a_forced_backend_that_cannot_run_keeps_the_engine_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path, "llama")
    monkeypatch.setattr(dispatch, "find_spec", absent("numba"))
    with pytest.raises(ConfigError, match="--kernels 'compiled' cannot run here: numba is not installed"):
        make_engine(tmp_path, kernels="compiled")
    assert make_engine(tmp_path)._runner._ops.name == "reference"


def test_only_four_bit_weights_can_be_kept_written_out(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"--base-cache bf16 keeps 4-bit weights.*quantization: none"):
        make_engine(tmp_path, base_cache="bf16")
