"""The canonical form every adapter method compiles to: rank-one rows and vectors per site, and a few things beside.

With `W` what the site computes without its bias (see `base_layout.Site`) and `b0` that bias, a site computes

    y = out_scale * W(in_scale * x) + b0_scale * b0 + bias + sum_i gain_i * act_i(a_i . x + c_i) * b_i + delta x

where absent scales are 1, an absent bias and delta are 0, and `b0_scale` is `out_scale` if `scales_base_bias`, else 1:
methods that scale a layer's whole output scale the base's bias with it, methods that rescale the weight alone do not.
So an adapter is compiled without knowing b0; whoever applies it writes, from the base's own output `y_base`,
`out_scale * y_base` in the first case and `out_scale * (y_base - b0) + b0` in the second.

Beside its sites an adapter may answer for tokens (`TokenRows`), bring keys and values of its own (`PrefixKv`), and
change certain tokens of a sequence only (`Positions`).

The layers that store, cache and batch adapters know this form only, never a method's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.positions import Positions

Floats = NDArray[np.float32]


class Activation(IntEnum):
    """What a row applies between its dot product and its output; the number travels to the kernels."""

    IDENTITY = 0
    RELU = 1
    GELU_TANH = 2
    SILU = 3


@dataclass(frozen=True)
class Rows:
    """Rank-one updates of one site."""

    a: Floats  # [num_rows, in_features]
    b: Floats  # [num_rows, out_features]
    gain: Floats  # [num_rows]
    c: Floats  # [num_rows], added before the activation
    activation: NDArray[np.int8]  # [num_rows], of `Activation`

    @classmethod
    def of(
        cls, a: Floats, b: Floats, gain: float | Floats = 1.0, c: Floats | None = None, act: Activation | None = None
    ) -> Rows:
        """a [num_rows, in_features], b [num_rows, out_features]; one gain for all or one for each."""
        num_rows = len(a)
        return cls(
            a=np.ascontiguousarray(a, np.float32),
            b=np.ascontiguousarray(b, np.float32),
            gain=np.broadcast_to(np.asarray(gain, np.float32), num_rows).copy(),
            c=np.zeros(num_rows, np.float32) if c is None else np.ascontiguousarray(c, np.float32),
            activation=np.full(num_rows, act or Activation.IDENTITY, np.int8),
        )

    def __len__(self) -> int:
        return int(self.gain.shape[0])

    def arrays(self) -> tuple[Floats, ...]:
        """Every number."""
        return self.a, self.b, self.gain, self.c


@dataclass(frozen=True)
class SiteUpdate:
    """What one adapter does at one site; what it does not do is None."""

    site: str  # module path, a key of `BaseLayout.index()`
    rows: Rows | None = None
    in_scale: Floats | None = None  # [in_features]
    out_scale: Floats | None = None  # [out_features]; at a norm's site the new weight, its offset included
    bias: Floats | None = None  # [out_features]
    scales_base_bias: bool = False  # whether out_scale multiplies b0 too, see the formula above
    delta: Floats | None = None  # [out_features, in_features], where no short list of rows says the same

    @property
    def num_rows(self) -> int:
        return 0 if self.rows is None else len(self.rows)

    def arrays(self) -> tuple[Floats, ...]:
        """Every number."""
        rest = (self.in_scale, self.out_scale, self.bias, self.delta)
        rows = () if self.rows is None else self.rows.arrays()
        return (*rows, *(array for array in rest if array is not None))


@dataclass(frozen=True)
class TokenRows:
    """What the embedding answers to some token ids in place of its own rows.

    Ids from the vocabulary's size on are virtual tokens, which the adapter puts before every prompt: theirs must be
    0, 1, 2, ... behind the vocabulary, and what they answer is taken as it is. The rows of real tokens are weights: the
    embedding multiplies them with its `output_scale` as it does with its own.
    """

    token_ids: NDArray[np.int64]  # [num_rows], ascending, each once
    values: Floats  # [num_rows, hidden_size]
    reach_head: bool = False  # whether the output head multiplies with them too: a tied one that was trained so

    def arrays(self) -> tuple[Floats, ...]:
        """Every number."""
        return (self.values,)


@dataclass(frozen=True)
class PrefixKv:
    """Keys and values of tokens before every prompt; no rotary positions are applied to them."""

    keys: Floats  # [num_layers, num_tokens, num_kv_heads, head_dim]
    values: Floats  # [num_layers, num_tokens, num_kv_heads, head_dim]

    @property
    def num_tokens(self) -> int:
        return int(self.keys.shape[1])

    def arrays(self) -> tuple[Floats, ...]:
        """Every number."""
        return self.keys, self.values


Part = SiteUpdate | TokenRows | PrefixKv


@dataclass(frozen=True)
class CompiledAdapter:
    """A whole adapter in canonical form, at most one update per site."""

    digest: str  # "sha256:<hex>" of the content it was compiled from
    updates: tuple[SiteUpdate, ...]
    tokens: TokenRows | None = None
    prefix: PrefixKv | None = None
    positions: Positions = field(default_factory=Positions)  # of everything it changes

    @classmethod
    def of(cls, digest: str, parts: Iterable[Part], positions: Positions) -> CompiledAdapter:
        """Several updates of one site are added up; of tokens and prefixes there is at most one."""
        updates: dict[str, SiteUpdate] = {}
        tokens, prefixes = list[TokenRows](), list[PrefixKv]()
        for part in parts:
            if isinstance(part, TokenRows):
                tokens.append(part)
            elif isinstance(part, PrefixKv):
                prefixes.append(part)
            else:
                updates[part.site] = _sum(updates[part.site], part) if part.site in updates else part
        assert len(tokens) <= 1, "an adapter answers for its tokens in one part"
        assert len(prefixes) <= 1, "an adapter has one prefix"
        token_rows, prefix = next(iter(tokens), None), next(iter(prefixes), None)
        return cls(digest, tuple(updates.values()), token_rows, prefix, positions)


def _sum(first: SiteUpdate, second: SiteUpdate) -> SiteUpdate:
    """Both at once: rows side by side, biases and deltas added. Scales belong to one of them at most."""
    for name in ("in_scale", "out_scale"):
        assert getattr(first, name) is None or getattr(second, name) is None, f"{first.site} has {name} twice"
    rows = [rows for rows in (first.rows, second.rows) if rows is not None]
    return SiteUpdate(
        site=first.site,
        rows=_concatenated(rows) if rows else None,
        in_scale=_one_of(first.in_scale, second.in_scale),
        out_scale=_one_of(first.out_scale, second.out_scale),
        bias=_added(first.bias, second.bias),
        scales_base_bias=first.scales_base_bias or second.scales_base_bias,
        delta=_added(first.delta, second.delta),
    )


def _concatenated(rows: list[Rows]) -> Rows:
    return Rows(
        a=np.concatenate([each.a for each in rows]),
        b=np.concatenate([each.b for each in rows]),
        gain=np.concatenate([each.gain for each in rows]),
        c=np.concatenate([each.c for each in rows]),
        activation=np.concatenate([each.activation for each in rows]),
    )


T = TypeVar("T")


def _one_of(first: T | None, second: T | None) -> T | None:
    return second if first is None else first


def _added(first: Floats | None, second: Floats | None) -> Floats | None:
    return first + second if first is not None and second is not None else _one_of(first, second)
