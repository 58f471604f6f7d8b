"""Fused operations in transformers' modelling code: what is recognised, and that logits stay what they were."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from heddle_kernels import torch_elementwise
from heddle_server.engine.fused_modules import fuse_modules
from tiny_models import FAMILIES, VOCABULARY, make_tiny_model
from tolerances import LOGITS_FP32

CPU = torch.device("cpu")
NUM_LAYERS = 3  # of every tiny model

# Norms (the last one, and those of every layer) and attentions that torch_elementwise serves.
SERVED = {
    "llama": (7, 3),
    "qwen2": (7, 3),
    "qwen3": (13, 3),
    "mistral": (7, 3),
    "gemma2": (13, 3),
    "gemma3_text": (19, 3),
    "phi3": (7, 3),
    "olmo2": (13, 3),
    "granite": (7, 3),
    "smollm3": (7, 3),
    "glm4": (13, 0),  # rotates neighbours, not halves
    "cohere": (0, 0),  # rotates neighbours, and its norm takes the mean away
    "starcoder2": (0, 3),
    "gpt_neox": (0, 3),
    "gpt2": (0, 0),
    "mixtral": (7, 3),
    "qwen3_moe": (13, 3),
}
WITHOUT_GATED_MLP = {"starcoder2", "gpt_neox", "gpt2", "mixtral", "qwen3_moe"}


def triton_elementwise() -> ModuleType:
    pytest.importorskip("triton")
    from heddle_kernels.triton_kernels import elementwise

    return elementwise


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    token_ids = torch.arange(11)[None] * 7 % VOCABULARY
    answer: Tensor = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), use_cache=False).logits[0]
    return answer


def assert_alike(after: Tensor, before: Tensor) -> None:
    assert (after - before).abs().max() <= LOGITS_FP32 * before.abs().max().clamp(min=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_answers_alike(family: str) -> None:
    model, twin = make_tiny_model(family), make_tiny_model(family)
    before = logits(model)
    report = fuse_modules(model, torch_elementwise, torch.float32, CPU)
    norms = sum(count for kind, count in report.fused.items() if "Norm" in kind)
    attentions = sum(count for kind, count in report.fused.items() if "rotary" in kind)
    assert (norms, attentions) == SERVED[family], str(report)
    assert_alike(logits(model), before)
    assert torch.equal(logits(twin), before), "another model of the same class changed as well"
    report.undo()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "qwen3"])
def test_a_model_fused_with_triton_answers_alike(family: str) -> None:
    """Gelu and 1 + weight; gate and up in one linear; norms of heads."""
    model = make_tiny_model(family)
    before = logits(model)
    report = fuse_modules(model, triton_elementwise(), torch.float32, CPU)
    assert sum(report.fused.values()) == sum(SERVED[family]) + NUM_LAYERS, str(report)
    assert not report.left
    assert_alike(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gated_mlp_is_recognised(family: str) -> None:
    report = fuse_modules(make_tiny_model(family), triton_elementwise(), torch.float32, CPU)
    mlps = sum(count for kind, count in report.fused.items() if "MLP" in kind)
    assert mlps == (0 if family in WITHOUT_GATED_MLP else NUM_LAYERS), str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2"])
def test_the_norm_that_rounds_like_the_models_own_is_chosen(family: str, dtype: torch.dtype) -> None:
    """In 16 bits the three forms of a norm are within tolerance of one another: the nearest must win."""
    model = make_tiny_model(family).to(dtype)
    norm = model.get_submodule("model.norm")
    x = torch.randn(64, 64).to(dtype)
    own = norm(x)
    assert fuse_modules(model, torch_elementwise, dtype, CPU).fused[type(norm).__name__]
    assert (norm(x) == own).float().mean() > 0.99


def test_what_is_replaced_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="heddle_server.engine.fused_modules"):
        fuse_modules(make_tiny_model("glm4"), torch_elementwise, torch.float32, CPU)
    (line,) = caplog.messages
    assert "fused 13 Glm4RMSNorm; left" in line
    assert "Glm4MLP (no faster operation here)" in line
    assert "rotary of Glm4Attention (no operation here computes the same, the nearest is" in line


class Recorder(nn.Module):
    """In place of a linear, as a woven one would be; notes what it was called with."""

    def __init__(self, base: nn.Module, calls: list[tuple[nn.Module, Tensor]]) -> None:
        super().__init__()
        self.base, self.calls = base, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.base, x))
        y: Tensor = self.base(x)
        return y


def test_linears_are_called_through_their_parent() -> None:
    """Linears woven after fusing are the ones that run: gate first, then up with the very same tensor."""
    model = make_tiny_model("llama")
    before = logits(model)
    fuse_modules(model, triton_elementwise(), torch.float32, CPU)
    mlp: nn.Module = model.get_submodule("model.layers.1.mlp")
    gate, up, down = (mlp.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
    calls = list[tuple[nn.Module, Tensor]]()
    for name, linear in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        setattr(mlp, name, Recorder(linear, calls))
    assert_alike(logits(model), before)
    assert [linear for linear, _ in calls] == [gate, up, down]
    assert calls[0][1] is calls[1][1]


class GatedMLP(nn.Module):
    """The usual structure under names of its own, and with whatever product it is given."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w3, self.w2, self.w1 = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 20)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(self.product(self.w1(x), self.w3(x)))
        return y


def test_a_structure_is_not_enough() -> None:
    """Whatever computes something else is left, although it looks the part."""

    def silu(gate: Tensor, up: Tensor) -> Tensor:
        return nn.functional.silu(gate) * up

    def clamped(gate: Tensor, up: Tensor) -> Tensor:
        return nn.functional.silu(gate).clamp(max=0.5) * up

    def looks_at_its_batch(gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate, up).view(2, 7, -1)

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    for product, is_fused in ((silu, True), (clamped, False), (looks_at_its_batch, False)):
        mlp = GatedMLP(product)
        report = fuse_modules(mlp, triton_elementwise(), torch.float32, CPU)
        assert report.fused["GatedMLP"] == is_fused, str(report)
        assert ("GatedMLP" in report.left) != is_fused
    mlp = GatedMLP(silu)
    before = mlp(x)
    fuse_modules(mlp, triton_elementwise(), torch.float32, CPU)
    assert_alike(mlp(x), before)


class NormOfTwo(nn.Module):
    """A norm that takes a second input, as gated ones do: not ours to replace."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = nn.functional.rms_norm(x, (8,), self.weight, self.eps)
        return y if gate is None else y * gate


def test_a_norm_with_another_signature_is_left() -> None:
    assert not fuse_modules(NormOfTwo(), torch_elementwise, torch.float32, CPU).modules
