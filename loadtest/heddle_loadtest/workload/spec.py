"""A workload as people write it: every key of the YAML form, its meaning, its limits. Reads no file and draws nothing.

Rates are requests per second, times are seconds, lengths are tokens. An unknown key is an error.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

MAX_RATE = 1e6  # requests per second
Rate = Annotated[float, Meta(gt=0, le=MAX_RATE)]
RateOrNone = Annotated[float, Meta(ge=0, le=MAX_RATE)]
Seconds = Annotated[float, Meta(gt=0, le=1e7)]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Tokens = Annotated[int, Meta(ge=1, le=1_000_000)]
Share = Annotated[float, Meta(ge=0, le=1)]
Exponent = Annotated[float, Meta(ge=0, le=100)]


class _Part(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A part without kinds."""


class _Kind(Struct, tag_field="kind", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One of several kinds of a part; the key `kind` says which."""


# When requests are due -----------------------------------------------------------------------------------------------


class Closed(_Kind, frozen=True, kw_only=True, tag="closed"):
    """Each stream asks again as soon as it has its answer."""

    streams: Count


class Constant(_Kind, frozen=True, kw_only=True, tag="constant"):
    """One request every 1 / rate seconds."""

    rate: Rate


class Poisson(_Kind, frozen=True, kw_only=True, tag="poisson"):
    """Independent users: exponential gaps."""

    rate: Rate


class Gamma(_Kind, frozen=True, kw_only=True, tag="gamma"):
    """Gamma-distributed gaps with this coefficient of variation: 1 is Poisson, more is burstier (as in S-LoRA)."""

    rate: Rate
    cv: Annotated[float, Meta(gt=0, le=100)]


class Bursts(_Kind, frozen=True, kw_only=True, tag="bursts"):
    """Poisson at one rate, then at another, in turn."""

    rate_on: Rate
    rate_off: RateOrNone = 0.0
    on_seconds: Seconds
    off_seconds: Seconds
    random_phases: bool = False  # phases of exponential length with these means (a Markov-modulated Poisson process)


class Ramp(_Kind, frozen=True, kw_only=True, tag="ramp"):
    """Poisson with a rate that moves in a straight line over the run; needs `seconds`."""

    rate_from: RateOrNone
    rate_to: RateOrNone


class Diurnal(_Kind, frozen=True, kw_only=True, tag="diurnal"):
    """Poisson with a rate that swings as a sine around its mean: one period is a day, however short."""

    rate: Rate  # the mean
    swing: Share = 0.8  # of the mean, up and down
    period_seconds: Seconds


class Trace(_Kind, frozen=True, kw_only=True, tag="trace"):
    """Times, and lengths where they say `kind: trace`, from a file."""

    file: str  # relative to the spec's own folder
    format: str = "auto"  # burstgpt, azure, mooncake; auto looks at the first line
    speed: Rate = 1.0  # 2: in half the time


Arrivals = Closed | Constant | Poisson | Gamma | Bursts | Ramp | Diurnal | Trace


# For which adapter ---------------------------------------------------------------------------------------------------


class InTurn(_Kind, frozen=True, kw_only=True, tag="in-turn"):
    """One after the other, around and around."""


class Distinct(_Kind, frozen=True, kw_only=True, tag="distinct"):
    """Every request has an adapter of its own, as far as there are adapters; then around again."""


class Uniform(_Kind, frozen=True, kw_only=True, tag="uniform"):
    """Each as likely as the other."""


class SquareRoot(_Kind, frozen=True, kw_only=True, tag="square-root"):
    """Punica's "uniform": of n requests, ceil(sqrt(n)) adapters, equally often, in random order."""


class Skewed(_Kind, frozen=True, kw_only=True, tag="skewed"):
    """Punica's "skewed": each adapter `ratio` times as often as the next, in random order."""

    ratio: Annotated[float, Meta(gt=1, le=100)] = 1.5


class Identical(_Kind, frozen=True, kw_only=True, tag="identical"):
    """All the first."""


class Zipf(_Kind, frozen=True, kw_only=True, tag="zipf"):
    """The i-th adapter, from 1, with a likelihood in proportion to i ** -alpha."""

    alpha: Exponent = 1.0


class SLoraPower(_Kind, frozen=True, kw_only=True, tag="slora-power"):
    """As S-LoRA's trace generator draws: int(numpy.random.power(alpha) * n); alpha 1 is exactly uniform."""

    alpha: Annotated[float, Meta(gt=0, le=1)] = 1.0


class ByRank(_Kind, frozen=True, kw_only=True, tag="by-rank"):
    """Chameleon's: each rank equally likely, then Zipf(alpha) among the adapters of that rank."""

    alpha: Exponent = 1.0


class Dealt(_Kind, frozen=True, kw_only=True, tag="dealt"):
    """dLoRA's skew: the functions of a trace, the most invoked first, dealt out to the adapters `stride` at a time.

    Around and around; the larger the stride, the more of the popular functions are the first adapter's. As no trace is
    shipped, the i-th of `functions` functions is invoked with a likelihood in proportion to i ** -alpha.
    """

    stride: Count
    functions: Annotated[int, Meta(ge=1, le=100_000)] = 400
    alpha: Exponent = 1.0


class Drift(_Kind, frozen=True, kw_only=True, tag="drift"):
    """A hot set gets `hot_share` of the requests, uniformly; every period one adapter leaves it and another enters."""

    hot: Count
    hot_share: Share = 0.9
    period_seconds: Seconds


class Storm(_Kind, frozen=True, kw_only=True, tag="storm"):
    """Uniform over the `warm` first adapters; from `at_seconds` on, every request an adapter not asked for before.

    When all have had their turn, it is calm again.
    """

    warm: Count
    at_seconds: Seconds


class Weighted(_Kind, frozen=True, kw_only=True, tag="weighted"):
    """These likelihoods, in the order of the adapters; the last one holds for all that follow."""

    weights: Annotated[tuple[RateOrNone, ...], Meta(min_length=1)]


Popularity = (
    InTurn
    | Distinct
    | Uniform
    | SquareRoot
    | Skewed
    | Identical
    | Zipf
    | SLoraPower
    | ByRank
    | Dealt
    | Drift
    | Storm
    | Weighted
)


# How long ------------------------------------------------------------------------------------------------------------


class Between(_Kind, frozen=True, kw_only=True, tag="uniform"):
    """Each whole number from `low` to `high`, both included, equally likely."""

    low: Tokens
    high: Tokens

    def __post_init__(self) -> None:
        if self.high < self.low:
            raise ValueError(f"`high` {self.high} is below `low` {self.low}")


class Lognormal(_Kind, frozen=True, kw_only=True, tag="lognormal"):
    """exp(N(ln(median), sigma)), rounded, at least `low` and at most `high`."""

    median: Annotated[float, Meta(ge=1, le=1_000_000)]
    sigma: Annotated[float, Meta(ge=0, le=10)]
    low: Tokens = 1
    high: Tokens = 1_000_000


class FromTrace(_Kind, frozen=True, kw_only=True, tag="trace"):
    """As long as the trace that the arrivals come from says."""


Length = Tokens | Between | Lognormal | FromTrace


# What is asked -------------------------------------------------------------------------------------------------------


class Questions(_Kind, frozen=True, kw_only=True, tag="questions"):
    """Chats that ask these, or short ones that are built in, in an order that the seed decides."""

    questions: tuple[str, ...] = ()


class Words(_Kind, frozen=True, kw_only=True, tag="words"):
    """Chats of random English words, about one token each; what the target counted stands in the results."""

    tokens: Length


class TokenIds(_Kind, frozen=True, kw_only=True, tag="token-ids"):
    """Completions of random token ids: as many tokens as asked for, whatever the tokenizer."""

    tokens: Length
    vocabulary: Annotated[int, Meta(ge=16, le=10_000_000)]  # ids are drawn below this
    first: Annotated[int, Meta(ge=0)] = 3  # and from here on: the first few are special tokens as a rule

    def __post_init__(self) -> None:
        if self.first >= self.vocabulary:
            raise ValueError(f"`first` {self.first} is not below `vocabulary` {self.vocabulary}")


Prompts = Questions | Words | TokenIds


class Output(_Part, frozen=True, kw_only=True):
    """How long answers are."""

    tokens: Length
    exact: bool = True  # asks the target to go on after an end-of-sequence token, where its API can say so


# The adapters --------------------------------------------------------------------------------------------------------


class AdapterKind(_Part, frozen=True, kw_only=True):
    """What `heddle-loadtest adapters` makes for every n-th adapter; the load itself only uses the rank (`by-rank`)."""

    method: str = "lora"  # lora, rslora or ia3
    rank: Annotated[int, Meta(ge=1, le=4096)] = 16  # ia3 has none
    modules: str = "all"  # the linears it is on: all, attention, mlp, qkv; or module names with commas between


class Adapters(_Part, frozen=True, kw_only=True):
    """Which adapters are asked for, the most popular first. Exactly one of `names`, `count` and `listed`."""

    names: tuple[str, ...] = ()  # "base" is the base model
    count: Count | None = None  # so many, named after `name`
    listed: bool = False  # the base and all that the target lists when the run starts
    name: str = "adapter-{index:05d}"  # with the index, from 0, and the `rank` and `method` of its kind
    kinds: Annotated[tuple[AdapterKind, ...], Meta(min_length=1)] = (AdapterKind(),)  # in turn

    def __post_init__(self) -> None:
        if (bool(self.names) + (self.count is not None) + self.listed) != 1:
            raise ValueError("give exactly one of `names`, `count` and `listed`")


# The whole -----------------------------------------------------------------------------------------------------------


class Uploads(_Part, frozen=True, kw_only=True):
    """Adapters that are uploaded while the run goes on (heddle only), one every `every_seconds`.

    From `settle_seconds` after an upload is due on, `share` of the requests ask for it, until the next one. They are
    the last ones of `adapters`, which nothing else asks for; their files come from `--adapter-files`.
    """

    count: Count
    every_seconds: Seconds
    settle_seconds: Annotated[float, Meta(ge=0, le=1e5)] = 1.0  # an upload that takes longer shows as 404s
    share: Share = 0.2


class Slo(_Part, frozen=True, kw_only=True):
    """What an answer must keep to be worth something to its user; a failed request keeps nothing."""

    ttft_seconds: Seconds | None = None
    tpot_seconds: Seconds | None = None
    end_to_end_seconds: Seconds | None = None


class Tenant(_Part, frozen=True, kw_only=True):
    """A class of requests of its own, beside the others; what it leaves out is as in the workload."""

    arrivals: Arrivals | None = None
    adapters: Adapters | None = None
    popularity: Popularity | None = None
    prompt: Prompts | None = None
    output: Output | None = None
    api_key_env: str | None = None  # environment variable that holds its key


class Workload(_Part, frozen=True, kw_only=True):
    """A workload; with a seed it is a schedule."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    about: str = ""  # where it comes from
    requests: Count | None = None  # ends after so many, over all tenants together
    seconds: Seconds | None = None  # no request is due later
    arrivals: Arrivals
    adapters: Adapters = Adapters(names=("base",))
    popularity: Popularity = InTurn()
    prompt: Prompts = Questions()
    output: Output = Output(tokens=64, exact=False)
    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.0
    tenants: dict[str, Tenant] = {}
    uploads: Uploads | None = None
    slo: Slo | None = None
    warmup: Annotated[int, Meta(ge=0, le=1000)] = 1  # short requests to each adapter before measuring
    variants: dict[str, dict[str, Any]] = {}  # name -> keys that differ; `--variant` chooses

    def __post_init__(self) -> None:
        if self.requests is None and self.seconds is None and not isinstance(self.arrivals, Trace):
            raise ValueError("the run has no end: give `requests`, `seconds` or both")
