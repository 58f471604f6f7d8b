"""Where adapters may change a model beside its linears: norms, the embedding, and what each layer's blocks add.

Found by structure and by what a first forward shows, never by a model's name. A place that is not there in some
architecture is simply not offered: an adapter that wants it is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

PARALLEL = "{} (parallel)"  # the path of a parallel site; no module is named so
PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)


@dataclass
class SeenModules:
    """What modules were given and answered in one forward, by path; held, so that no two tensors have one identity."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerPlaces:
    """Modules of one layer, by path; None where it has no such module, or several."""

    layer: str
    attention: str | None
    mlp: str | None
    mlp_norm: str | None  # whose output the MLP reads


@dataclass(frozen=True)
class NormPlace:
    """A norm, and which axis of what it normalises counts tokens: some are given heads before tokens."""

    path: str
    token_axis: int


@dataclass(frozen=True)
class Places:
    """Modules of a model, by path."""

    norms: tuple[NormPlace, ...]
    layers: tuple[LayerPlaces, ...]
    width: int  # of the stream between layers
    embedding: str
    head: str | None
    head_is_tied: bool


def norms_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every leaf that has a weight for each channel, perhaps a bias of that width, and nothing else to learn."""
    return [(path, module) for path, module in model.named_modules() if _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.ndim != 1 or next(module.children(), None) is not None:
        return False
    others = [parameter for name, parameter in parameters.items() if name != "weight"]
    return all(name in ("weight", "bias") for name in parameters) and all(
        other.shape == weight.shape for other in others
    )


def unmistakable(model: PreTrainedModel) -> int:
    """A number of tokens that is no other size of the model, so that an axis of that length counts tokens."""
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    sizes |= {value for value in model.config.get_text_config().to_dict().values() if isinstance(value, int)}
    return next(number for number in PRIMES if number not in sizes)


def find_places(model: PreTrainedModel, seen: SeenModules, num_tokens: int) -> Places:
    """From one forward of `num_tokens` tokens, a number as `unmistakable` gives it."""
    path_of = {id(module): path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding is not None, "a causal language model reads tokens"
    layers = layers_of(model)
    widths = {seen.outputs[path].shape[-1] for path, _ in layers if path in seen.outputs}
    is_one_stream = len(widths) == 1
    return Places(
        norms=tuple(_norm_places(model, seen, num_tokens)),
        layers=tuple(_layer_places(path, layer, seen) for path, layer in layers) if is_one_stream else (),
        width=widths.pop() if is_one_stream else 0,
        embedding=path_of[id(embedding)],
        head=None if head is None else path_of[id(head)],
        head_is_tied=head is not None and head.weight is embedding.weight,
    )


def _norm_places(model: PreTrainedModel, seen: SeenModules, num_tokens: int) -> Iterator[NormPlace]:
    for path, _ in norms_of(model):
        shape = seen.inputs[path].shape[:-1] if path in seen.inputs else ()
        if list(shape).count(num_tokens) == 1:
            yield NormPlace(path, list(shape).index(num_tokens))


def layers_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder layers with their paths, in order."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            layers = [(f"{path}.{name}", layer) for name, layer in module.named_children()]
            if all(_attention_names(layer) for _, layer in layers):
                return layers
    return []


def _attention_names(layer: nn.Module) -> list[str]:
    return [name for name, child in layer.named_children() if hasattr(child, "layer_idx")]


def _layer_places(path: str, layer: nn.Module, seen: SeenModules) -> LayerPlaces:
    attention = _attention_names(layer)
    mlps = [
        name
        for name, child in layer.named_children()
        if name not in attention and any(parameter.ndim > 1 for parameter in child.parameters())
    ]
    mlp = f"{path}.{mlps[0]}" if len(mlps) == 1 else None
    read = None if mlp is None else seen.inputs.get(mlp)
    norms = [f"{path}.{name}" for name, _ in norms_of(layer)]
    return LayerPlaces(
        layer=path,
        attention=f"{path}.{attention[0]}" if len(attention) == 1 else None,
        mlp=mlp,
        mlp_norm=None if read is None else next((norm for norm in norms if seen.outputs.get(norm) is read), None),
    )
