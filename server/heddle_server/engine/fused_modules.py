"""Fused operations in place of a model's own RMS norms, rotary positions and gated MLPs.

A candidate is known by its structure, never by its model's name, and is replaced only when, on random input in the
serving dtype, the replacement gives what the original gives. Replacing is setting a module's own `forward`: parameters,
paths and classes stay as they are, other models are not touched, and `FusedReport.undo` takes it all back.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Largest deviation of a replacement relative to the largest value of the original's output: some roundings of a sum in
# float32; one or two of a product in the others, whose originals round more often than the replacements.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NUM_TRIAL_TOKENS = 5
TRIAL_WIDTHS = (32, 48)  # hidden and intermediate, of the linears that stand in for an MLP's own in the trial
ROTARY_NAME = "apply_rotary_pos_emb"  # what modelling code calls, as a global, with (query, key, cos, sin)

MISFITS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)  # of foreign code that wants other input

Forward = Callable[..., Any]


@dataclass
class FusedReport:
    """What was replaced, what was left and why, by kind of module."""

    fused: Counter[str] = field(default_factory=Counter)  # how many modules
    left: dict[str, str] = field(default_factory=dict)  # the reason
    modules: list[nn.Module] = field(default_factory=list)  # whose forward is ours

    def undo(self) -> None:
        """Give every module its own forward back."""
        for module in self.modules:
            del module.__dict__["forward"]
        self.modules.clear()
        self.fused.clear()

    def __str__(self) -> str:
        fused = ", ".join(f"{count} {kind}" for kind, count in sorted(self.fused.items())) or "nothing"
        left = ", ".join(f"{kind} ({reason})" for kind, reason in sorted(self.left.items())) or "nothing"
        return f"fused {fused}; left {left}"


@dataclass(frozen=True)
class Trial:
    """Where replacements are compared with their originals: as they will be served."""

    ops: ModuleType  # offers some of rms_norm, rotary, silu_mul, gelu_tanh_mul, as triton_kernels.elementwise has them
    dtype: torch.dtype
    device: torch.device

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def best(self, original: Forward, replacements: Iterable[tuple[Forward, Forward]]) -> Forward | str:
        """Of (function to compare with `original`, forward to put in) the forward that came nearest; or why none does.

        All functions take no arguments and return tensors.
        """
        errors = list[tuple[float, Forward]]()
        try:
            expected = original()
            errors += [(_error(computed(), expected), forward) for computed, forward in replacements]
        except MISFITS as misfit:
            return f"could not be tried: {type(misfit).__name__}"
        if not errors:
            return "no faster operation here"
        error, forward = min(errors, key=lambda pair: pair[0])
        return (
            forward
            if error <= TOLERANCE[self.dtype]
            else f"no operation here computes the same, the nearest is {error:.0e} off"
        )


@dataclass(frozen=True)
class Candidate:
    """A module that looks as if a fused operation could do its work."""

    kind: str  # in the report
    likeness: object  # equal for modules that one trial decides about
    choose: Callable[[Trial], Forward | str]  # the forward to put in, or why the module is left


def fuse_modules(
    model: nn.Module, elementwise_ops: ModuleType, dtype: torch.dtype, device: torch.device
) -> FusedReport:
    """Replace what can be replaced, and log one line about it.

    What `elementwise_ops` lacks is left. To be called before the linears are woven: a fused MLP calls whatever modules
    its own attributes name at the time of the call, gate and up with the very same tensor.
    """
    trial = Trial(elementwise_ops, dtype, device)
    report, choices = FusedReport(), dict[object, Forward | str]()
    with torch.no_grad(), torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(0)
        for module in model.modules():
            candidate = _norm(module) or _gated_mlp(module) or _rotary_user(module, model)
            if candidate is None or "forward" in module.__dict__:  # an instance's own: someone else's replacement
                continue
            if candidate.likeness not in choices:
                choices[candidate.likeness] = candidate.choose(trial)
            choice = choices[candidate.likeness]
            if isinstance(choice, str):
                report.left[candidate.kind] = choice
                continue
            module.forward = MethodType(choice, module)
            report.modules.append(module)
            report.fused[candidate.kind] += 1
    logger.info("elementwise operations: %s", report)
    return report


def _norm(module: nn.Module) -> Candidate | None:
    """A leaf with a weight for every channel and nothing else to learn, and an epsilon."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    if len(list(module.parameters())) != 1 or len(list(module.children())) or not _takes_one_input(module):
        return None

    def choose(trial: Trial) -> Forward | str:
        twin = _twin(module, _parameters={"weight": nn.Parameter(torch.randn_like(weight))})
        x = trial.random(1, NUM_TRIAL_TOKENS, len(weight))
        forms = [{}, {"rounds_first": False}, {"adds_one": True, "rounds_first": False}]
        forwards = [_norm_forward(trial.ops.rms_norm, eps, form) for form in forms if hasattr(trial.ops, "rms_norm")]
        return trial.best(lambda: twin(x), [(partial(forward, twin, x), forward) for forward in forwards])

    return Candidate(type(module).__name__, (type(module), len(weight), weight.dtype, eps), choose)


def _norm_forward(rms_norm: Forward, eps: float, form: dict[str, bool]) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        return rms_norm(hidden_states, self.weight, eps, **form)

    return forward


def _gated_mlp(module: nn.Module) -> Candidate | None:
    """Three linears, or two if gate and up are one, whose widths fit `down(act(gate(x)) * up(x))`, and nothing else."""
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    others = [child for name, child in module.named_children() if name not in linears]
    if not linears or any(list(other.parameters()) for other in others) or not _takes_one_input(module):
        return None
    roles = [names for names in permutations(linears) if _fit_together([linears[name] for name in names])]
    if not roles:
        return None

    def choose(trial: Trial) -> Forward | str:
        stand_ins = _stand_ins({name: linears[name] for name in roles[0]}, trial)
        twin = _twin(module, _modules={**module._modules, **stand_ins})
        x = trial.random(1, NUM_TRIAL_TOKENS, stand_ins[roles[0][0]].in_features)
        products = [getattr(trial.ops, name) for name in ("silu_mul", "gelu_tanh_mul") if hasattr(trial.ops, name)]
        forwards = [_mlp_forward(product, names) for product in products for names in roles]
        return trial.best(lambda: twin(x), [(partial(forward, twin, x), forward) for forward in forwards])

    shapes = tuple((name, linear.in_features, linear.out_features) for name, linear in linears.items())
    return Candidate(type(module).__name__, (type(module), shapes, tuple(map(repr, others))), choose)


def _fit_together(linears: list[nn.Linear]) -> bool:
    """Whether these are gate, up and down, or gate-and-up and down, as far as their widths tell."""
    if len(linears) not in (2, 3):
        return False
    *readers, down = linears
    hidden = {reader.in_features for reader in readers} | {down.out_features}
    return len(hidden) == 1 and {reader.out_features * len(readers) for reader in readers} == {2 * down.in_features}


def _stand_ins(linears: dict[str, nn.Linear], trial: Trial) -> dict[str, nn.Linear]:
    """Small random linears in the order gate, up, down. The base's own are not run: bitsandbytes rearranges its weights
    at their first use on a CPU."""
    hidden, intermediate = TRIAL_WIDTHS
    *readers, down = linears
    widths = {name: (hidden, 2 * intermediate // len(readers)) for name in readers} | {down: (intermediate, hidden)}
    return {
        name: nn.Linear(*width, bias=False, device=trial.device, dtype=trial.dtype) for name, width in widths.items()
    }


def _mlp_forward(product: Forward, names: tuple[str, ...]) -> Forward:
    """For (gate, up, down) or (gate and up side by side, down)."""

    def of_three(self: Any, x: Tensor) -> Any:
        gate, up = getattr(self, names[0])(x), getattr(self, names[1])(x)
        return getattr(self, names[2])(product(gate, up))

    def of_two(self: Any, x: Tensor) -> Any:
        gate, up = getattr(self, names[0])(x).chunk(2, dim=-1)
        return getattr(self, names[1])(product(gate, up))

    return of_three if len(names) == 3 else of_two


def _rotary_user(module: nn.Module, model: nn.Module) -> Candidate | None:
    """An attention whose forward calls its modelling module's global function for rotary positions."""
    own = type(module).forward
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if not isinstance(own, FunctionType) or ROTARY_NAME not in own.__code__.co_names or not isinstance(head_dim, int):
        return None
    original: Forward = own.__globals__[ROTARY_NAME]

    def choose(trial: Trial) -> Forward | str:
        if not hasattr(trial.ops, "rotary"):
            return "no faster operation here"
        rotary_dims = {2 * len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
        inputs = [_rotary_input(trial, head_dim, rotary_dim) for rotary_dim in sorted(rotary_dims)]
        computed, forward = trial.ops.rotary, _rotary_forward(own, original, trial.ops.rotary)
        return trial.best(
            lambda: [states for given in inputs for states in original(*given)],
            [(lambda: [states for given in inputs for states in computed(*given)], forward)],
        )

    return Candidate(f"rotary of {type(module).__name__}", (own, head_dim), choose)


def _rotary_input(trial: Trial, head_dim: int, rotary_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, cos and sin, laid out as in a forward."""
    angles = torch.randn(1, NUM_TRIAL_TOKENS, rotary_dim // 2, device=trial.device).repeat(1, 1, 2)
    query, key = (trial.random(1, NUM_TRIAL_TOKENS, heads, head_dim).transpose(1, 2) for heads in (4, 2))
    return query, key, angles.cos().to(trial.dtype), angles.sin().to(trial.dtype)


def _rotary_forward(own: FunctionType, original: Forward, rotary: Forward) -> Forward:
    """The same forward, in which the global name means our function: for the modules that get it, and for no others."""

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        if rest or options:  # another layout than transformers' usual one
            return original(query, key, cos, sin, *rest, **options)
        return rotary(query, key, cos, sin)

    namespace = {**own.__globals__, ROTARY_NAME: rotate}
    forward = FunctionType(own.__code__, namespace, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


def _takes_one_input(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2  # itself and x


def _twin(module: nn.Module, **parts: Any) -> Any:
    """The same module with other parts, for a trial; the original stays untouched."""
    twin = copy.copy(module)
    twin.__dict__.update(parts)
    return twin


def _error(computed: Tensor | list[Tensor], expected: Tensor | list[Tensor]) -> float:
    """Largest deviation relative to the largest expected value; infinite where dtypes or shapes differ."""
    ours, theirs = ([one] if isinstance(one, Tensor) else one for one in (computed, expected))
    pairs = list(zip(ours, theirs, strict=True))
    if any(mine.dtype != own.dtype or mine.shape != own.shape for mine, own in pairs):
        return math.inf
    error = max(((mine.double() - own.double()).abs().max() / own.double().abs().max()).item() for mine, own in pairs)
    return math.inf if math.isnan(error) else error
