"""The results of `heddle bench serving` as people read them. Computes nothing."""

from __future__ import annotations

from heddle_demo.bench.ratio import Ratio
from heddle_demo.bench.serving_results import ServingResults
from heddle_demo.bench.text_table import text_table


def print_serving(results: ServingResults) -> None:
    """The setting, a row per mix and arm, and whether both arms served the same."""
    plan, machine = results.plan, results.machine
    threads = f"{results.num_threads} thread{'s' if results.num_threads > 1 else ''}"
    print(
        f"\n{plan.shape}, random weights in NF4, on {results.device} ({machine['cpu']}, {threads}, "
        f"torch {machine['torch']}, revision {machine['revision']}): {plan.batch} requests of {plan.num_prompt_tokens} "
        f"prompt and {plan.num_new_tokens} new tokens, {plan.num_adapters} adapters of rank {plan.rank} on all "
        f"linears. Medians of {plan.num_rounds} rounds{', the arms in turn' if plan.has_peft else ''}.\n"
    )
    headings = ["mix", "arm", "tokens/s", "prefill ms", "decode tokens/s", "of own base", "its floor", "over PEFT"]
    print(text_table(headings, [_row(results, mix, arm) for mix in plan.mixes for arm in results.arms], num_left=2))
    print("\nOf own base: decode steps only; its floor is the most there could be if only reading memory took time.")
    if results.peft is not None:
        _print_agreement(results)


def _row(results: ServingResults, mix: str, arm: str) -> list[str]:
    summary = results.summary(arm, mix)
    is_ours = arm == "heddle"
    retention = results.retention(mix) if is_ours and mix != "base" else None
    return [
        mix,
        arm,
        f"{summary.tokens_per_second:.1f}",
        "" if summary.prefill_seconds is None else f"{1000 * summary.prefill_seconds:.1f}",
        "" if summary.decode_tokens_per_second is None else f"{summary.decode_tokens_per_second:.1f}",
        _cell(retention),
        "" if retention is None else f"{results.floor_retention(mix):.3f}",
        _cell(results.against_peft(mix) if is_ours else None),
    ]


def _print_agreement(results: ServingResults) -> None:
    assert results.peft is not None
    print(f"\nPEFT kept its adapters in {results.peft['adapter_dtype']}, which was faster here.")
    for agreement in results.agreements:
        print(
            f"The same tokens by both, {'base' if agreement.adapter is None else f'adapter {agreement.adapter}'}: "
            f"log-probabilities {agreement.relative_error:.1%} apart; the same best token at {agreement.num_equal} of "
            f"the {agreement.num_decided} places of {agreement.num_tokens} that are no near tie."
        )
    if results.adapter_effect is not None:
        print(f"An adapter moves log-probabilities by {results.adapter_effect:.1%} or more.")


def _cell(ratio: Ratio | None) -> str:
    return "" if ratio is None else str(ratio)
