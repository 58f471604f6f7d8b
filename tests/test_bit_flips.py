"""A flipped bit in what is stored of an adapter is never served: the answer is right, or an error about that adapter.

A pool for one adapter and no host memory make every request read its adapter from disk again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch

from engine_driver import Answer, make_request, run
from heddle_adapters.content_folder import content_paths
from heddle_adapters.store import AdapterStore
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_server.engine.engine import Engine
from random_uploads import RandomUploads
from test_families import make_engine, prompt_of
from tiny_models import VOCABULARY, save_tiny_model

NUM_ADAPTERS = 6
RANK = 4
PAGES_BESIDE_AN_ADAPTER = 3  # for keys and values
SAME_LOGPROBS = 1e-4  # alone and in the same order; another adapter's are off by more than 0.1
PROMPT = prompt_of(20, 1)


class Damage(NamedTuple):
    """What is done at once; rows are a cache of the content and may also be missing."""

    flips_content: bool
    rows: Literal["sound", "flipped", "missing"]


DAMAGES = (Damage(False, "flipped"), Damage(True, "sound"), Damage(True, "flipped"), Damage(True, "missing"))


class Outcome(NamedTuple):
    """What came of it."""

    damage: Damage
    flipped_file: str | None  # of the content
    answer: str  # "right", or the error's code

    def __str__(self) -> str:
        flipped = self.flipped_file or "no content"
        return f"{flipped} flipped, rows {self.damage.rows}: {self.answer}"


class DamagedStore:
    """Adapters whose right answers are known, and the files that make them."""

    def __init__(self, tiny: Path, path: Path) -> None:
        roomy = make_engine(tiny, store_path=str(path))
        with AdapterStore(path) as store:
            uploads = RandomUploads(store, roomy.model.layout)
            names = [f"a{number}" for number in range(NUM_ADAPTERS)]
            self.digests = [uploads.put(name, rank=RANK, seed=seed).digest for seed, name in enumerate(names)]
        self._path = path
        self._right = {digest: ask(roomy, digest).logprobs[0] for digest in self.digests}
        num_pages = roomy.stats().num_adapter_pages // NUM_ADAPTERS + PAGES_BESIDE_AN_ADAPTER
        self.pool_bytes = num_pages * roomy.model.page_bytes
        roomy.close()

    def is_right(self, answer: Answer, digest: str) -> bool:
        """Raises AssertionError for an answer that is neither right nor an error."""
        if answer.error_code is not None:
            return False
        off = (answer.logprobs[0] - self._right[digest]).abs().max().item()
        assert off < SAME_LOGPROBS, f"{digest} was answered by other weights, off by {off}"
        return True

    def rows_file(self, digest: str) -> Path:
        (rows,) = (self._path / "rows").glob(f"*/{digest.removeprefix('sha256:')}.rows")
        return rows

    def content_files(self, digest: str) -> tuple[Path, ...]:
        return content_paths(self._path, digest)


def ask(engine: Engine, digest: str) -> Answer:
    salt = random.randbytes(8)  # so that the whole prompt is computed
    (answer,) = run(engine, [make_request(PROMPT, digest, max_tokens=1, num_logprobs=VOCABULARY, salt=salt)])
    return answer


def flip_a_bit(path: Path, source: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    path.write_bytes(data)


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[tuple[DamagedStore, Engine]]:
    tiny = tmp_path / "tiny"
    save_tiny_model(tiny, "llama")
    store = DamagedStore(tiny, tmp_path / "store")
    engine = make_engine(
        tiny, store_path=str(tmp_path / "store"), pool_bytes=store.pool_bytes, host_cache_bytes=0, max_model_len=32
    )
    yield store, engine
    engine.close()


def flip_bits(store: DamagedStore, engine: Engine, num_flips: int) -> Counter[Outcome]:
    """How often each outcome was met."""
    source = random.Random(num_flips)
    outcomes = Counter[Outcome]()
    for number in range(num_flips):
        damage = DAMAGES[number % len(DAMAGES)]
        victim, other = source.sample(store.digests, 2)
        assert store.is_right(ask(engine, other), other)  # and the victim is not on the device any more
        rows, content = store.rows_file(victim), source.choice(store.content_files(victim))
        sound = content.read_bytes()
        if damage.flips_content:
            flip_a_bit(content, source)
        if damage.rows == "flipped":
            flip_a_bit(rows, source)
        elif damage.rows == "missing":
            rows.unlink()
        answer = ask(engine, victim)
        told = "right" if store.is_right(answer, victim) else str(answer.error_code)
        outcomes[Outcome(damage, content.name if damage.flips_content else None, told)] += 1
        content.write_bytes(sound)
        assert store.is_right(ask(engine, other), other), "another adapter suffers"
        assert store.is_right(ask(engine, victim), victim), "sound content is refused"
    assert engine.stats().num_adapter_loads > num_flips, "nothing was read again"
    return outcomes


def check(outcomes: Counter[Outcome]) -> None:
    """Damaged weights are an error wherever they are read; a flip in the config may be of no consequence."""
    for outcome in outcomes:
        if not outcome.damage.flips_content or outcome.damage.rows == "sound":
            assert outcome.answer == "right", f"{outcomes}"
        elif outcome.flipped_file == WEIGHTS_FILE:
            assert outcome.answer == "adapter_damaged", f"{outcomes}"
        else:
            assert outcome.answer in ("right", "adapter_damaged"), f"{outcomes}"
    assert {outcome.damage for outcome in outcomes} == set(DAMAGES)


def test_flipped_bits_are_not_served(damaged: tuple[DamagedStore, Engine]) -> None:
    check(flip_bits(*damaged, num_flips=100))


@pytest.mark.slow
def test_no_flipped_bit_of_a_thousand_is_served(
    damaged: tuple[DamagedStore, Engine], record_property: Callable[[str, object], None]
) -> None:
    outcomes = flip_bits(*damaged, num_flips=1000)
    record_property("outcomes", {str(outcome): count for outcome, count in outcomes.items()})
    check(outcomes)


def test_a_flip_would_show(damaged: tuple[DamagedStore, Engine]) -> None:
    """The adapters' answers differ by far more than is let pass."""
    store, engine = damaged
    one, other = (ask(engine, digest).logprobs[0] for digest in store.digests[:2])
    assert torch.max((one - other).abs()) > 1000 * SAME_LOGPROBS
