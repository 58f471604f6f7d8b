"""The device that something is measured on."""

from __future__ import annotations

import torch

from heddle_demo.bench.failure import BenchFailed


def choose_device(wanted: str) -> torch.device:
    """ "auto" is an NVIDIA GPU where there is one; raises BenchFailed where "cuda" is wanted and there is none."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BenchFailed("--device cuda was asked for, but torch finds no NVIDIA GPU on this machine.")
    return torch.device(wanted, 0) if wanted == "cuda" else torch.device(wanted)


def device_name(device: torch.device) -> str:
    """What it is called by who made it; "cpu" for the processor, which the machine's description names."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
