"""Linear layers that read the same input and are computed together: q, k and v, or gate and up."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

MAX_SITES = 3  # of a group: q, k and v


@dataclass(frozen=True)
class SiteGroup:
    """A run of consecutive site numbers. Their outputs lie side by side: y [num_tokens, sum of out_features].

    An adapter's rows for consecutive sites are consecutive entries of the row table's heap, so the group's rows are
    one run as well.
    """

    first_site: int
    in_features: int
    out_features: tuple[int, ...]  # of each site

    @property
    def sites(self) -> range:
        return range(self.first_site, self.first_site + len(self.out_features))

    @property
    def column_start(self) -> tuple[int, ...]:
        """Where each site's columns begin in the group's output."""
        return (0, *accumulate(self.out_features[:-1]))

    def alone(self, site: int) -> SiteGroup:
        """The group of one of its sites only."""
        return SiteGroup(site, self.in_features, (self.out_features[site - self.first_site],))
