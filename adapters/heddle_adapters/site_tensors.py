"""Sorts a file's tensors by the base's sites, reading PEFT's key names.

PEFT saves `base_model.model.<module path>.<part>`; converters often leave the first two words out. Only modules that
the base's layout lists are ever named by the result, so no key can reach anything else of the base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from heddle_adapters.base_layout import BaseLayout, Site, SiteKind
from heddle_adapters.errors import MAX_MISMATCHES, AdapterIncompatible, InvalidAdapter, listed, quoted
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class SiteTensors:
    """The tensors a file has for one site."""

    site: Site
    parts: Mapping[str, TensorInfo]  # by what follows the module path in the name

    def require(self, part: str) -> TensorInfo:
        """The tensor of that part; raises `InvalidAdapter` where the file lacks it."""
        if part not in self.parts:
            present = " and ".join(self.parts)
            message = f"{WEIGHTS_FILE} has {present} for {self.site.path}, but no {part}; save the adapter again."
            raise InvalidAdapter(message, param=WEIGHTS_FILE)
        return self.parts[part]


def by_site(
    tensors: Iterable[TensorInfo], parts: Collection[str], base: BaseLayout, *kinds: SiteKind
) -> tuple[SiteTensors, ...]:
    """The sites of these kinds, or the linear ones, for which the file has at least one of `parts`, in order.

    Tensors whose names end in none of `parts` are left for the caller to account for. Raises `AdapterIncompatible`
    for modules that the base lacks and `InvalidAdapter` for two tensors of one part.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    for tensor in tensors:
        part = next((part for part in parts if tensor.name.endswith("." + part)), None)
        if part is None:
            continue
        module = tensor.name.removesuffix("." + part).removeprefix(PEFT_PREFIX)
        if found.setdefault(module, {}).setdefault(part, tensor) is not tensor:
            names = f"{quoted(found[module][part].name)} and {quoted(tensor.name)}"
            raise InvalidAdapter(f"{WEIGHTS_FILE} has both {names}; keep one of them.", param=WEIGHTS_FILE)
    known = base.by_path(*kinds or ("linear",))
    missing = [quoted(module) for module in found if module not in known]
    if missing:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE} changes modules that {base.model_name} does not have: {listed(missing, MAX_MISMATCHES)}; "
            "upload it where the base it was trained on is served.",
            param=WEIGHTS_FILE,
        )
    return tuple(SiteTensors(site, found[path]) for path, site in known.items() if path in found)
