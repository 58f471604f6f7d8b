"""The adapters of a workload by name and kind. Knows no requests, no popularity and no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec.structs import replace

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.names import BASE
from heddle_loadtest.workload.spec import AdapterKind, Adapters


def adapter_names(adapters: Adapters) -> tuple[str, ...]:
    """All of them, the most popular first. SpecError for `listed`, which only a target can spell out."""
    if adapters.listed:
        problem = "are known only when a target is asked"
        raise SpecError("adapters.listed", None, problem, "Name them: --set 'adapters.names=[base, my-adapter]'")
    if adapters.count is None:
        return _unique("adapters.names", adapters.names, "Name each once")
    names = tuple(_format_name(adapters, index) for index in range(adapters.count))
    return _unique("adapters.name", names, "Put {index} into `name`")


def num_adapters(adapters: Adapters) -> int | None:
    """How many; None for `listed`, where nobody knows yet."""
    return None if adapters.listed else adapters.count or len(adapters.names)


def kind_of(adapters: Adapters, index: int) -> AdapterKind:
    """What the adapter with this index is: the kinds take turns."""
    return adapters.kinds[index % len(adapters.kinds)]


def adapter_ranks(adapters: Adapters) -> list[int]:
    """The rank of each, 0 for an (IA)3, which has none. Only `count` adapters have ranks that anyone knows."""
    assert adapters.count is not None, "checked before: ranks need `count`"
    kinds = (kind_of(adapters, index) for index in range(adapters.count))
    return [0 if kind.method == "ia3" else kind.rank for kind in kinds]


def spell_out(adapters: Adapters, names: Sequence[str]) -> Adapters:
    """`listed` as names, the base first; adapters that are not `listed` as they are."""
    if not adapters.listed:
        return adapters
    return replace(adapters, listed=False, names=tuple(dict.fromkeys([BASE, *names])))


def _format_name(adapters: Adapters, index: int) -> str:
    kind = kind_of(adapters, index)
    try:
        return adapters.name.format(index=index, rank=kind.rank, method=kind.method)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        remedy = "Use {index}, {rank} and {method}, for example adapter-{index:05d}"
        raise SpecError("adapters.name", adapters.name, "is no pattern for names", remedy) from error


def _unique(field: str, names: tuple[str, ...], remedy: str) -> tuple[str, ...]:
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise SpecError(field, name, f"stands for {times} adapters", remedy)
    return names
