"""What a request's adapters were when it was admitted, and whether they can be used together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from heddle_adapters.mix import AdapterPart, adapter_key, in_order
from heddle_adapters.store_index import AdapterVersion
from heddle_server.api.errors import AdaptersNotAdditive, InvalidRequest


@dataclass(frozen=True)
class ChosenAdapter:
    """One adapter of a request."""

    reference: str  # as the client wrote it
    scale: float
    version: AdapterVersion
    asker: str  # the tenant whose request it is
    rank: int | None = None  # how many of its ranks are used; None = all

    @property
    def part(self) -> AdapterPart:
        """As the engine wants it."""
        return AdapterPart(self.version.digest, self.scale, self.rank)

    @property
    def told_reference(self) -> str:
        """The version; another owner's with the owner, as the asker may have one of the same name."""
        return self.version.reference if self.version.owner == self.asker else self.version.full_reference


@dataclass(frozen=True)
class AdapterChoice:
    """None for the base, one, or a mix of several; the same from a request's first to its last token."""

    adapters: tuple[ChosenAdapter, ...] = ()

    @property
    def parts(self) -> tuple[AdapterPart, ...]:
        """As the engine wants them."""
        return in_order([each.part for each in self.adapters])

    @property
    def key(self) -> str:
        """The identity of the weights that answer: an adapter's digest, or a mix's; "" is the base."""
        return adapter_key(self.parts)

    @property
    def single(self) -> ChosenAdapter | None:
        """The one adapter, where it is used as it was trained."""
        is_single = len(self.adapters) == 1 and self.adapters[0].part.is_whole
        return self.adapters[0] if is_single else None

    @property
    def num_virtual_tokens(self) -> int:
        """That it puts before every prompt."""
        return sum(each.version.num_virtual_tokens for each in self.adapters)

    @property
    def references(self) -> tuple[str, ...]:
        """As the client wrote them, but with full names."""
        return tuple(each.version.full_name + each.reference.removeprefix(each.version.name) for each in self.adapters)

    @property
    def names(self) -> tuple[str, ...]:
        """Full names without version or alias, each once."""
        return tuple(dict.fromkeys(each.version.full_name for each in self.adapters))

    def check(self) -> None:
        """Raises what forbids to use these adapters together, or with these scales and ranks."""
        self._check_distinct()
        for each in self.adapters:
            _check_rank(each)
        if self.single is not None:
            return
        if alone := [each for each in self.adapters if each.version.combination == "alone"]:
            raise AdaptersNotAdditive(
                f"{_list(alone)} can only be used alone and without a scale: what it changes is neither a sum nor a "
                "product.",
                param="adapter",
            )
        sums = [each for each in self.adapters if _is_sum(each)]
        products = [each for each in self.adapters if not _is_sum(each)]
        if sums and products:
            raise AdaptersNotAdditive(
                f"{_list(sums)} adds to what the base computes and {_list(products)} multiplies it: adapters of the "
                "two kinds cannot be mixed. Name adapters of one kind.",
                param="adapter",
            )

    def _check_distinct(self) -> None:
        first: dict[str, ChosenAdapter] = {}
        for each in self.adapters:
            other = first.setdefault(each.version.digest, each)
            if other is not each:
                remedy = f", with the scales added up: {other.scale + each.scale:g}" if _is_sum(each) else ""
                raise InvalidRequest(
                    f"{other.reference!r} and {each.reference!r} are the same adapter. Name it once{remedy}.",
                    param="adapter",
                )

    def __iter__(self) -> Iterator[ChosenAdapter]:
        return iter(self.adapters)


def _check_rank(adapter: ChosenAdapter) -> None:
    """Ranks are rows of which the first are an adapter too; where it scales, or brings more, they are not all of it."""
    if adapter.rank is None:
        return
    max_rank = adapter.version.max_rank
    if not _is_sum(adapter) or not max_rank:
        raise InvalidRequest(
            f"{_list([adapter])} cannot be used at a lower rank: only what adds ranks and nothing else can be. Leave "
            "'rank' out.",
            param="adapter",
        )
    if adapter.rank > max_rank:
        raise InvalidRequest(
            f"{adapter.reference!r} has rank {max_rank}, and rank {adapter.rank} is asked for. Ask for {max_rank} at "
            "most, or leave 'rank' out.",
            param="adapter",
        )


def _is_sum(adapter: ChosenAdapter) -> bool:
    return adapter.version.combination == "sum"


def _list(adapters: list[ChosenAdapter]) -> str:
    return " and ".join(f"{each.reference!r} ({each.version.method})" for each in adapters)
