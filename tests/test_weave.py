"""Which linears are computed together, that joining changes nothing, and adapters that tell a group's sites apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from heddle_adapters.base_layout import BaseLayout
from heddle_kernels.cpu_kernels.ops import CpuOps
from heddle_kernels.ops import Ops
from heddle_kernels.reference import ReferenceOps
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_kernels.site_group import SiteGroup
from heddle_server.engine import base_linear
from heddle_server.engine.adapter_batch import AdapterBatch, ForwardContext
from heddle_server.engine.attention import ATTENTION_NAME, register_attention
from heddle_server.engine.base_linear import NEVER, TRIED_TOKENS, BaseLinears, DenseForMany, measured_crossover
from heddle_server.engine.joined_linear import join
from heddle_server.engine.probe import probe
from heddle_server.engine.weave import WovenLinear, site_of, weave
from row_samples import canonical, layout_of, make_rows, pack, place, random_rows, random_scales, relative_error
from tiny_models import FAMILIES, make_tiny_model

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
GROUPS = {  # by family, the names of the linears that are joined in every layer
    **{family: [QKV, GATE_UP] for family in FAMILIES},
    "phi3": [],  # its checkpoint has them joined
    "gpt2": [],
    "gpt_neox": [],
    "glm4": [QKV],
    "starcoder2": [QKV],
    "mixtral": [QKV],
    "qwen3_moe": [QKV],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_reads_the_same_input_is_found(family: str) -> None:
    register_attention()
    model = make_tiny_model(family)
    model.set_attn_implementation(ATTENTION_NAME)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = [tuple(path.rpartition(".")[2] for path in run) for run in probe(model).shared_inputs]
    assert found == GROUPS[family] * model.config.num_hidden_layers
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, nn.Linear))


def linear(in_features: int, out_features: int, bias: bool, kind: str) -> Any:
    plain = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False).eval()
    if kind == "dense":
        return plain
    nested = kind == "nested"
    made = Linear4bit(
        in_features, out_features, bias=bias, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested
    )
    made.weight = Params4bit(plain.weight.data, quant_type="nf4", compress_statistics=nested, module=made)
    made.bias = plain.bias
    made.to("cpu")
    made.weight.quant_state.dtype = torch.float32
    made.support_avx512bf16_for_cpu = False
    return made.eval()


@pytest.mark.parametrize("kind", ["dense", "plain", "nested"])
@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, False)])
def test_joined_linears_answer_what_they_answered_apart(biases: tuple[bool, ...], kind: str) -> None:
    torch.manual_seed(0)
    apart = [linear(128, width, bias, kind) for width, bias in zip((64, 32, 96), biases, strict=True)]
    x = torch.randn(5, 128)
    expected = torch.cat([module(x) for module in apart], dim=1)
    joined = join(apart)
    assert joined is not None
    assert not joined.training
    assert relative_error(joined(x), expected.double()) < 1e-6


def test_what_cannot_be_joined_stays_apart() -> None:
    dense, packed = linear(64, 64, False, "dense"), linear(64, 64, False, "plain")
    assert join([dense, packed]) is None
    assert join([dense, linear(64, 64, False, "dense").bfloat16()]) is None
    odd = linear(48, 5, False, "plain")  # 240 weights: its last block of 64 is not full
    assert join([odd, odd]) is None


class Trio(nn.Module):
    """Stands for a layer: three linears that read the same input, one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(40, 56), nn.Linear(40, 24, bias=False), nn.Linear(40, 24)
        self.o = nn.Linear(56, 40)

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize("ops", [ReferenceOps(), CpuOps()], ids=lambda ops: ops.name)
@pytest.mark.parametrize("scaled", [(), ("q",), ("k", "v"), ("q", "k", "v", "o"), ("o",)])
def test_a_groups_sites_may_differ_in_everything(scaled: tuple[str, ...], ops: Ops) -> None:
    """Rows at all sites of one adapter, scaled inputs at some of another, base tokens between."""
    torch.manual_seed(1)
    generator = np.random.default_rng(1)
    model = Trio().requires_grad_(False)
    own: dict[str, tuple[Any, Any]] = {name: (module.weight, module.bias) for name, module in model.named_children()}
    layout: BaseLayout = layout_of(*(site_of(name, module) for name, module in model.named_children()))
    context = ForwardContext(ops)
    sites, groups = weave(model, [("q", "k", "v")], BaseLinears(ops, torch.float32, keep_dense=False), context)
    assert sites == layout.sites
    assert groups == (SiteGroup(0, 40, (56, 24, 24)), SiteGroup(3, 56, (40,)))
    rows, _ = make_rows(layout, torch.float32, num_pages=4000)
    low_rank = {site.path: random_rows(site, 3, generator, has_bias=True) for site in layout.sites}
    scaling = {site.path: random_scales(site, generator, of_input=True) for site in layout.sites if site.path in scaled}
    placed = [
        place(rows, pack(layout, torch.float32, list(updates.values()))) for updates in (low_rank, scaling or low_rank)
    ]
    runs = [(placed[0].slot, 2), (BASE_SLOT, 1), (placed[1].slot, 3)]
    segments = Segments.from_runs(runs)
    plan = context.ops.plan_rows(rows.rows, rows.vectors, rows.table, segments)
    lines = [rows.line_of(each.slot) for each in placed]
    batch = AdapterBatch(
        plan, plan, frozenset(range(4)), frozenset[int]().union(*(line.scaled_input_sites for line in lines))
    )
    inputs = {40: torch.randn(1, 6, 40), 56: torch.randn(1, 6, 56)}

    def answers() -> dict[str, Tensor]:
        return {name: getattr(model, name)(inputs[own[name][0].shape[1]])[0] for name in own}

    base = answers()
    with context.using(batch):
        actual = answers()
    for name, (weight, bias) in own.items():
        x = inputs[weight.shape[1]][0]
        updates = [low_rank.get(name), None, (scaling or low_rank).get(name)]
        truth = torch.cat(
            [
                canonical(update, part, weight, bias)
                for update, part in zip(updates, torch.split(x, [2, 1, 3]), strict=True)
            ]
        )
        assert relative_error(actual[name], truth) < 1e-5
        assert relative_error(base[name], canonical(None, x, weight, bias)) < 1e-5


def test_a_member_asked_with_another_input_is_computed_anew() -> None:
    model = Trio().requires_grad_(False)
    own = [(module.weight, module.bias) for module in (model.q, model.k, model.v)]
    weave(
        model,
        [("q", "k", "v")],
        BaseLinears(ReferenceOps(), torch.float32, keep_dense=False),
        ForwardContext(ReferenceOps()),
    )
    first, second = torch.randn(2, 40), torch.randn(3, 40)
    for x, member in ((first, 0), (second, 1), (first, 2), (first, 2), (second, 0)):
        module = (model.q, model.k, model.v)[member]
        assert isinstance(module, WovenLinear)
        assert torch.allclose(module(x), nn.functional.linear(x, *own[member]), atol=1e-5)


def test_dense_weights_that_are_kept_answer_large_batches() -> None:
    packed = linear(128, 64, True, "nested")
    kept = BaseLinears(ReferenceOps(), torch.float32, keep_dense=True).make(packed)
    assert isinstance(kept, DenseForMany)
    for num_tokens in (1, 63, 64, 200):
        x = torch.randn(num_tokens, 128)
        assert relative_error(kept(x), packed(x).double()) < 1e-5
    plain = linear(8, 8, False, "dense")
    assert BaseLinears(ReferenceOps(), torch.float32, keep_dense=True).make(plain) is plain


@pytest.mark.parametrize(
    ("faster_at", "expected"),
    [((), NEVER), ((8,), NEVER), ((512,), 512), ((8, 128, 256, 512), 128), (TRIED_TOKENS, TRIED_TOKENS[0])],
)
def test_one_disturbed_trial_does_not_move_the_crossover(
    faster_at: tuple[int, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense weights are taken from where on they were faster at all numbers of tokens that were tried."""
    made = BaseLinears(ReferenceOps(), torch.float32, keep_dense=True).make(linear(128, 64, True, "nested"))
    assert isinstance(made, DenseForMany)

    def seconds(compute: Any, x: Tensor) -> float:
        return 2.0 if compute is made.quantised else 1.0 if len(x) in faster_at else 3.0

    monkeypatch.setattr(base_linear, "_seconds", seconds)
    assert measured_crossover(made) == expected
