"""Adapters against PEFT at batch 1: alone, all in one batch with the base, chunked, from a warm prefix cache."""

from __future__ import annotations

import pytest

from engine_driver import run
from parity_bench import Bench, ask, assert_is_peft, make_bench
from peft_samples import KINDS, tiny_gpt2, tiny_llama, tiny_qwen2

pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # PEFT, of merging, which nobody does


@pytest.fixture(scope="module", params=[tiny_llama, tiny_qwen2, tiny_gpt2], ids=["llama", "qwen2", "gpt2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(request.param, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", ["base", *KINDS])
def test_alone(bench: Bench, kind: str) -> None:
    (answer,) = run(bench.engine, [ask(bench, kind, 20)])
    assert_is_peft(bench, kind, answer)


def test_all_in_one_batch_with_chunked_prefill(bench: Bench) -> None:
    kinds = ["base", *KINDS, "base", *reversed(KINDS)]
    lengths = [70 - 3 * number for number in range(len(kinds))]
    answers = run(bench.engine, [ask(bench, kind, n) for kind, n in zip(kinds, lengths, strict=True)])
    for kind, answer in zip(kinds, answers, strict=True):
        assert_is_peft(bench, kind, answer)


def test_warm_prefix_cache(bench: Bench) -> None:
    kinds = ["base", *KINDS]
    first = run(bench.engine, [ask(bench, kind, 50) for kind in kinds])
    again = run(bench.engine, [ask(bench, kind, 50) for kind in kinds])
    for kind, cold, warm in zip(kinds, first, again, strict=True):
        assert warm.num_cached_tokens == 48, "three full pages of the same prompt under the same adapter"
        assert warm.token_ids == cold.token_ids
        assert_is_peft(bench, kind, warm)


def test_order_of_requests_does_not_matter(bench: Bench) -> None:
    kinds = ["base", *KINDS]
    forward = run(bench.engine, [ask(bench, kind, 25) for kind in kinds])
    backward = run(bench.engine, [ask(bench, kind, 25) for kind in reversed(kinds)])
    assert [a.token_ids for a in forward] == [a.token_ids for a in reversed(backward)]


def test_after_eviction_and_reload(bench: Bench) -> None:
    loads = bench.engine.stats().num_adapter_loads
    for digest in filter(None, bench.digests.values()):
        bench.engine.forget_adapter(digest)
    assert bench.engine.stats().num_resident_adapters == 0
    kinds = ["base", *KINDS]
    for kind, answer in zip(kinds, run(bench.engine, [ask(bench, kind, 30) for kind in kinds]), strict=True):
        assert_is_peft(bench, kind, answer)
    assert bench.engine.stats().num_adapter_loads == loads + len(KINDS)


def test_nothing_is_left_when_all_have_ended(bench: Bench) -> None:
    run(bench.engine, [ask(bench, kind, 20) for kind in ["base", *KINDS]])
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_pages) == (0, 0, 0)
    assert stats.num_free_pages + stats.num_cached_pages + stats.num_adapter_pages == stats.num_pages
