"""What `make gpu` runs, in which order, and how long each part may take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ENGINE_PACKAGES = ("bitsandbytes", "transformers", "accelerate", "safetensors", "msgspec")


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str  # for people
    bench: str  # "tests", "kernels", "step" or "serving"
    seconds: float  # after which it is ended
    settings: dict[str, Any] = field(default_factory=dict)  # of a benchmark's plan; of tests, "names"
    packages: tuple[str, ...] = ()  # without which it cannot run, beside torch and numpy


TEST_FILE = "tests/test_gpu_kernels.py"
TEST_SECONDS = 110
TESTED = ("rows", "nf4", "attention", "elementwise or graph")  # side by side: most of their time goes to the compiler


def test_parts(*, is_quick: bool) -> list[Part]:
    """Every kernel on the GPU. What the tests' names must contain chooses a part's tests."""
    packages = ("pytest", "triton")
    return [
        Part(f"tests of {names}", "tests", TEST_SECONDS, {"names": names}, packages)
        for names in TESTED[: 1 if is_quick else None]
    ]


def bench_parts(device: str, *, is_quick: bool) -> list[Part]:
    """What follows the tests, in the order of its worth: the last may find no time left.

    The quick form is for trying this program itself.
    """
    if is_quick:
        return _quick_parts(device)
    return [
        _kernels(80, device=device, shape="llama-3.1-8b", max_seconds=60.0, quick=True),
        _against_peft(100, device=device, shape="qwen2.5-0.5b", num_rounds=3),
        _steps(100, device=device, shape="llama-3.1-8b", batch=64, num_adapters=32),
        _serving(
            100,
            device=device,
            shape="llama-3.1-8b",
            batch=32,
            num_adapters=32,
            num_rounds=3,
            mixes=["base", "identical", "skewed", "uniform", "distinct"],
        ),
        _kernels(50, device=device, shape="qwen2.5-0.5b", max_seconds=35.0, quick=True),
        _steps(60, device=device, shape="qwen2.5-0.5b", batch=64, num_adapters=64),
    ]


def _quick_parts(device: str) -> list[Part]:
    common: dict[str, Any] = {"device": device, "shape": "tiny", "quick": True}
    return [
        _kernels(80, **common, tokens=[8], batches=[8], ranks=["16"]),
        _against_peft(100, **common, batch=4, num_adapters=4),
        _steps(100, **common, batch=4, num_adapters=4),
    ]


def _kernels(seconds: float, **settings: Any) -> Part:
    return Part(f"kernels, {settings['shape']}", "kernels", seconds, settings)


def _steps(seconds: float, **settings: Any) -> Part:
    name = f"steps of {settings['batch']}, {settings['shape']}, {settings['num_adapters']} adapters"
    return Part(name, "step", seconds, settings, ENGINE_PACKAGES)


def _serving(seconds: float, **settings: Any) -> Part:
    return Part(f"serving {settings['batch']}, {settings['shape']}", "serving", seconds, settings, ENGINE_PACKAGES)


def _against_peft(seconds: float, **settings: Any) -> Part:
    settings["has_peft"] = True
    name = f"serving against PEFT, {settings['shape']}"
    return Part(name, "serving", seconds, settings, (*ENGINE_PACKAGES, "peft"))
