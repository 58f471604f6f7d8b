"""Folders that pyreft's `ReftModel.save` wrote (pyreft 0.1 over pyvene 0.1): a config.json and a pickle per layer.

What pyreft does not save, the user says: which tokens are changed, and the activation. A class name in the config is
looked up in a table and never imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from heddle_adapters.methods.representation import P_BIAS, PEFT_TYPE, B, P, W
from heddle_server.convert.choices import Choices
from heddle_server.convert.converted import Converted
from heddle_server.convert.orthogonal import ORIGINAL, orthogonal_weight
from heddle_server.convert.source_folder import CannotConvert, SourceFolder

CONFIG = "config.json"
INTERVENTIONS = {
    "ConsreftIntervention": "consreft",
    "DireftIntervention": "direft",
    "LobireftIntervention": "lobireft",
    "LoreftIntervention": "loreft",
    "NodireftIntervention": "nodireft",
    "NoreftIntervention": "noreft",
}

_KEY = re.compile(r"layer_(?P<layer>\d+)_comp_block_output_unit_pos_nunit_1#(?P<copy>\d+)")
_PATH_KEY = re.compile(
    r"comp_(?:model_layers|transformer_h)\[(?P<layer>\d+)\]_output_unit_pos_nunit_1#(?P<copy>\d+)"
)  # of a component that was named by its path
_TYPE = re.compile(r"<class '[\w.]*?(?P<name>\w+)'>")


def recognises(folder: SourceFolder) -> bool:
    return folder.has(CONFIG) and "representations" in folder.json(CONFIG)


def convert(folder: SourceFolder, choices: Choices) -> Converted:
    config = folder.json(CONFIG)
    intervention = _intervention(config)
    if choices.first is None and choices.last is None:
        raise CannotConvert(
            "pyreft does not save which tokens it changes; say how many of a prompt's first and last ones with "
            "--first and --last, as in training (its positions 'f2+l3' are --first 2 --last 3)."
        )
    layers = {layer: _layer(folder, keys) for layer, keys in sorted(_keys_by_layer(config).items())}
    if intervention == "nodireft":
        for parts in layers.values():
            parts.pop(P_BIAS, None)  # which that class trains along and never adds
    tensors = {f"layers.{layer}.{part}": value for layer, parts in layers.items() for part, value in parts.items()}
    remarks = [f"pyreft's {intervention} at the layers {', '.join(map(str, layers))}."]
    if choices.activation is None and intervention in ("direft", "loreft", "nodireft", "noreft"):
        remarks.append("pyreft does not save act_fn; if one was set in training, say which with --activation.")
    return Converted(reft_config(intervention, choices, layers), tensors, tuple(remarks))


def reft_config(intervention: str, choices: Choices, layers: Mapping[int, Any]) -> dict[str, Any]:
    """An adapter_config.json of `representation.PEFT_TYPE`."""
    return {
        "peft_type": PEFT_TYPE,
        "intervention": intervention,
        "activation": choices.activation or "linear",
        "first": choices.first or 0,
        "last": choices.last or 0,
        "layers": [*layers],
    }


def _intervention(config: Mapping[str, Any]) -> str:
    types = {str(each) for each in config.get("intervention_types") or ()}
    names = {match["name"] if (match := _TYPE.fullmatch(each)) else each for each in types}
    if len(names) != 1 or not names <= INTERVENTIONS.keys():
        raise CannotConvert(
            f"{CONFIG} names the interventions {sorted(names)}; one of {', '.join(INTERVENTIONS)} can be converted, "
            "the same at every layer."
        )
    return INTERVENTIONS[names.pop()]


def _keys_by_layer(config: Mapping[str, Any]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for key in config.get("sorted_keys") or ():
        match = _KEY.fullmatch(str(key)) or _PATH_KEY.fullmatch(str(key))
        if match is None:
            raise CannotConvert(
                f"{CONFIG} has an intervention at {str(key)!r}; those on a layer's output (block_output) at single "
                "positions can be converted."
            )
        found.setdefault(int(match["layer"]), []).append(str(key))
    if not found:
        raise CannotConvert(f"{CONFIG} lists no sorted_keys; give the folder that ReftModel.save wrote.")
    return found


def _layer(folder: SourceFolder, keys: list[str]) -> dict[str, torch.Tensor]:
    """One layer's tensors; where first and last tokens have interventions of their own, they must be the same."""
    first, *others = (_parts(folder.tensors(f"intkey_{key}.bin"), key) for key in keys)
    for other in others:
        if first.keys() != other.keys() or not all(torch.equal(first[part], other[part]) for part in first):
            raise CannotConvert(
                f"{keys[0]} and {keys[1]} differ: first and last tokens have weights of their own, and one adapter "
                "cannot change them differently; train with share_weights=True."
            )
    return first


def _parts(state: Mapping[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    """The tensors of one pickle under heddle's names."""
    rotation = "rotate_layer.parametrizations.weight."
    names = {
        "weight": W,
        "bias": B,
        "learned_source": B,
        "learned_source.weight": W,
        "learned_source.bias": B,
        "proj_layer.weight": P,
        "proj_layer.bias": P_BIAS,
    }
    parts = {names[name]: value for name, value in state.items() if name in names}
    if "rotate_layer" in state:
        parts[P] = state["rotate_layer"].T
    elif rotation + ORIGINAL in state:
        parts[P] = orthogonal_weight(state, rotation).T
    ignored = {"embed_dim", "interchange_dim", "rotate_layer"} | names.keys()
    unknown = [name for name in state if name not in ignored and not name.startswith(rotation)]
    if unknown or P not in parts:
        raise CannotConvert(f"intkey_{key}.bin has {sorted(state)}, which is no state of a ReFT; save it again.")
    return parts
