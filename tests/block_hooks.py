"""Applies what an adapter does at a model's block sites, through torch hooks: the slow way that tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from heddle_adapters.canonical import Activation, CompiledAdapter, Floats, SiteUpdate

ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.IDENTITY: lambda x: x,
    Activation.RELU: torch.relu,
    Activation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    Activation.SILU: torch.nn.functional.silu,
}
MLP_NORMS = ("post_attention_layernorm", "ln_2")  # what reads the stream before a layer's MLP
PARALLEL = " (parallel)"  # ending of `base_samples.full_layout_of`'s parallel sites


def added(update: SiteUpdate, x: Floats) -> Floats:
    """What an update of a block site adds, by the canonical formula: x [tokens, width] to [tokens, width]."""
    total = np.zeros_like(x) if update.bias is None else np.broadcast_to(update.bias, x.shape).copy()
    if update.rows is not None:
        rows = update.rows
        inner = torch.from_numpy(x @ rows.a.T + rows.c)
        for activation, apply in ACTIVATIONS.items():
            mine = rows.activation == activation
            total += (rows.gain[mine] * apply(inner[:, mine]).numpy()) @ rows.b[mine]
    return total


@contextmanager
def applied(model: Any, adapter: CompiledAdapter, tokens: Any = slice(None)) -> Iterator[None]:
    """While it lasts, `model` computes with the adapter at these tokens of every sequence."""
    with ExitStack() as stack:
        for update in adapter.updates:
            stack.callback(_hook(model, update, tokens))
        yield


def _hook(model: Any, update: SiteUpdate, tokens: Any) -> Any:
    module = model.get_submodule(update.site.removesuffix(PARALLEL))
    stream: list[Any] = []

    def change(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        read = stream.pop() if stream else hidden
        changed = hidden.clone()
        flat = read[:, tokens].reshape(-1, read.shape[-1]).numpy()
        changed[:, tokens] += torch.from_numpy(added(update, flat)).view_as(read[:, tokens])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handles = [module.register_forward_hook(change)]
    if update.site.endswith(PARALLEL):
        layer = model.get_submodule(update.site.removesuffix(PARALLEL).rpartition(".")[0])
        norm = next(getattr(layer, name) for name in MLP_NORMS if hasattr(layer, name))
        handles.append(norm.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0])))
    return lambda: [handle.remove() for handle in handles]
