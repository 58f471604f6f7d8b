"""What the factored methods check alike: readers of their configs that bound what an upload can ask for, and sizes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter, quoted
from heddle_adapters.site_tensors import SiteTensors
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

# Far above every rank that is trained. Some of these methods unfold a few numbers of the file to rows of a whole
# layer's width, so that the size of an upload alone does not bound the work.
MAX_RANK = 8192
MAX_ABSOLUTE_SCALE = 1e4


def bounded_rank(config: AdapterConfig, field: str, default: int) -> int:
    """A whole number from 1 to `MAX_RANK`."""
    rank = config.rank(field, default)
    if rank > MAX_RANK:
        config.refuse(field, f"is {rank}; at most {MAX_RANK} is served.")
    return rank


def whole_number(config: AdapterConfig, field: str, default: int, minimum: int = 0) -> int:
    """A whole number of at least `minimum`."""
    value = config.fields.get(field, default)
    if type(value) is not int or value < minimum:
        config.refuse(field, f"must be a whole number of at least {minimum}, not {quoted(value)}.")
    return value


def flag_or_default(config: AdapterConfig, field: str, default: bool) -> bool:
    """True or false, for fields whose absence does not mean false."""
    return config.flag(field) if config.fields.get(field) is not None else default


def choice(config: AdapterConfig, field: str, default: str, choices: tuple[str, ...]) -> str:
    """One of a few words."""
    value = config.text(field) or default
    if value not in choices:
        config.refuse(field, f"is {quoted(value)}; served are {', '.join(choices)}.")
    return value


def bounded_scale(scale: float, module: str, fields: str) -> float:
    """`scale` itself, unless it is absurd; `fields` names where it comes from."""
    if abs(scale) > MAX_ABSOLUTE_SCALE:
        raise InvalidAdapter(
            f"{CONFIG_FILE}: {fields} scales {module} by {scale:g}; at most {MAX_ABSOLUTE_SCALE:g} is allowed.",
            param=CONFIG_FILE,
        )
    return scale


def check_size(tensor: TensorInfo, axis: int, promised: float, field: str) -> None:
    """Refuses a tensor whose size along one axis is not what the config says."""
    shape = tensor.shape
    if axis >= len(shape) or shape[axis] != promised:
        raise InvalidAdapter(
            f"{WEIGHTS_FILE}: {tensor.name} has shape {list(shape)}, but {field} of {CONFIG_FILE} gives {promised:g} "
            f"for axis {axis}; upload the config that was saved with these weights.",
            param=WEIGHTS_FILE,
        )


def check_indices(indices: NDArray[np.int64], part: str, module: str, table: str, length: int) -> None:
    """Refuses whole numbers of one module's part that point beside the entries of a table."""
    lowest, highest = int(indices.min()), int(indices.max())
    if lowest < 0 or highest >= length:
        raise InvalidAdapter(
            f"{WEIGHTS_FILE}: {part} of {module} holds {lowest if lowest < 0 else highest}, but {table} has the "
            f"entries 0 to {length - 1}; save the adapter again.",
            param=WEIGHTS_FILE,
        )


def divided(width: int, parts: int, found: SiteTensors, field: str) -> int:
    """`width` of one of the site's sides in equal parts; refuses a base whose layer cannot be cut so."""
    if width % parts:
        raise AdapterIncompatible(
            f"{CONFIG_FILE}: {field} cuts {found.site.path} into {parts} equal parts, and its {width} features do not "
            "divide so; upload it where the base it was trained on is served.",
            param=CONFIG_FILE,
        )
    return width // parts
