"""Attention over the pages of sequences with few new tokens: every page is widened once for all heads that read it.

A page's tail that nobody wrote holds anything, NaN too; only positions that a token sees are read at all.
"""

from __future__ import annotations

import numpy as np

from heddle_kernels.cpu_kernels.bits import Floats, Stored, compiled, narrow, widen
from heddle_kernels.cpu_kernels.exponential import exp, tanh
from heddle_kernels.cpu_kernels.inner_loops import (
    add_four_scaled,
    add_scaled,
    copy_into,
    dot,
    dot_four,
    highest_of,
    widen_into,
)
from heddle_kernels.cpu_kernels.rows import Ints, Longs
from heddle_kernels.cpu_kernels.team import Tasks, in_parallel, next_member, next_task


@compiled
def write_pages(key: Stored, value: Stored, kv: Stored, page_stride: int, page_tokens: int, write_slot: Longs) -> None:
    """Store the new tokens' keys and values in their pages.

    key, value [num_tokens, num_kv_heads * head_dim]; kv one layer's pages, flat, page_stride elements apart, each
    [2, page_tokens, num_kv_heads * head_dim]; write_slot [num_tokens] as in PagedBatch.
    """
    width = key.shape[1]
    for token, slot in enumerate(write_slot):
        begin = slot // page_tokens * page_stride + slot % page_tokens * width
        copy_into(key[token], kv[begin : begin + width])
        begin += page_tokens * width
        copy_into(value[token], kv[begin : begin + width])


@compiled
def attend_sequences(
    num_threads: int,
    tasks: Tasks,
    query: Stored,
    kv: Stored,
    page_stride: int,
    page_tokens: int,
    num_kv_heads: int,
    page_table: Ints,
    query_start: Ints,
    length: Ints,
    most_new_tokens: int,
    scaling: float,
    window: int,
    softcap: float,
    sinks: Floats,
    seen_room: Longs,
    token_room: Floats,
    page_room: Floats,
    score_room: Floats,
    out: Stored,
) -> None:
    """Causal attention of the sequences that have at most `most_new_tokens` new tokens; the others are left alone.

    query, out [num_tokens, num_heads, head_dim]; kv as in `write_pages`; page_table, query_start and length as in
    PagedBatch; window in tokens; softcap 0 for none; sinks [num_heads] or empty.

    To work in, of each thread: seen_room [most new tokens, 2]; token_room [2, most new tokens, query heads of a kv
    head, head_dim]; page_room [page_tokens, head_dim]; score_room [most new tokens, query heads of a kv head, longest
    length].
    """
    in_parallel(
        num_threads,
        _attend_heads,
        (
            tasks, query, kv, page_stride, page_tokens, num_kv_heads, page_table, query_start, length, most_new_tokens,
            scaling, window, softcap, sinks, seen_room, token_room, page_room, score_room, out,
        ),
    )  # fmt: skip


@compiled
def _attend_heads(
    tasks: Tasks,
    query: Stored,
    kv: Stored,
    page_stride: int,
    page_tokens: int,
    num_kv_heads: int,
    page_table: Ints,
    query_start: Ints,
    length: Ints,
    most_new_tokens: int,
    scaling: float,
    window: int,
    softcap: float,
    sinks: Floats,
    seen_rooms: Longs,
    token_rooms: Floats,
    page_rooms: Floats,
    score_rooms: Floats,
    out: Stored,
) -> None:
    """Task by task one sequence's key head, with all query heads that share it."""
    num_heads, head_dim = query.shape[1:]
    group = num_heads // num_kv_heads
    value_begin = page_tokens * num_kv_heads * head_dim
    member, mine, task = next_member(tasks), next_task(tasks), -1
    page_room = page_rooms[member]
    for sequence, pages in enumerate(page_table):
        begin, end = query_start[sequence], query_start[sequence + 1]
        num_new = end - begin
        if length[sequence] == 0 or num_new == 0 or num_new > most_new_tokens:
            continue
        seen, scores = seen_rooms[member, :num_new], score_rooms[member, :num_new]
        queries, sums = token_rooms[member, 0, :num_new], token_rooms[member, 1, :num_new]
        _fill_seen(length[sequence], window, seen)
        for kv_head in range(num_kv_heads):
            task += 1
            if task != mine:
                continue
            mine = next_task(tasks)
            first_head = kv_head * group
            head_pages = kv[kv_head * head_dim :]
            _scale_queries(query[begin:end], first_head, np.float32(scaling), queries)
            _fill_scores(queries, head_pages, page_stride, num_kv_heads, pages, seen, page_room, scores)
            if softcap > 0:
                _cap(scores, seen, np.float32(softcap))
            _normalise(scores, seen, sinks[first_head : first_head + group])
            _sum_values(scores, head_pages[value_begin:], page_stride, num_kv_heads, pages, seen, page_room, sums)
            _narrow_all(sums, out[begin:end], first_head)


@compiled
def _fill_seen(length: int, window: int, seen: Longs) -> None:
    """The bounds of the positions that each of the last tokens sees: [new tokens, 2]."""
    num_new = seen.shape[0]
    for token in range(num_new):
        stop = length - num_new + token + 1
        seen[token, 0] = max(0, stop - window)
        seen[token, 1] = stop


@compiled
def _scale_queries(query: Stored, first_head: int, scaling: np.float32, scaled: Floats) -> None:
    """query [tokens, all heads, head_dim] -> scaled [tokens, heads from first_head on, head_dim]."""
    for token in range(scaled.shape[0]):
        for head in range(scaled.shape[1]):
            for k in range(scaled.shape[2]):
                scaled[token, head, k] = widen(query[token, first_head + head, k]) * scaling


@compiled
def _fill_scores(
    query: Floats,
    keys: Stored,
    page_stride: int,
    num_kv_heads: int,
    pages: Ints,
    seen: Longs,
    wide: Floats,
    scores: Floats,
) -> None:
    """Dot products of the queries that share a key head with the keys that they see.

    query [tokens, heads, head_dim]; keys flat from the head's first key in page 0; seen [tokens, 2]
    -> scores [tokens, heads, positions], of which only those seen are filled.
    """
    num_tokens, num_heads, head_dim = query.shape
    page_tokens = wide.shape[0]
    first, stop = seen[0, 0], seen[num_tokens - 1, 1]
    for page in range(first // page_tokens, (stop + page_tokens - 1) // page_tokens):
        page_begin = page * page_tokens
        here = slice(max(first - page_begin, 0), min(stop - page_begin, page_tokens))
        _widen_page(keys[pages[page] * page_stride :], num_kv_heads * head_dim, here, wide)
        for token in range(num_tokens):
            begin, end = max(seen[token, 0], page_begin), min(seen[token, 1], page_begin + page_tokens)
            if begin >= end:
                continue
            for head in range(num_heads):
                _dots(query[token, head], wide[begin - page_begin :], scores[token, head, begin:end])


@compiled
def _widen_page(states: Stored, stride: int, here: slice, wide: Floats) -> None:
    """One head's states at the places `here` of a page: flat, a stride apart -> wide [page_tokens, head_dim]."""
    head_dim = wide.shape[1]
    for place in range(here.start, here.stop):
        widen_into(states[place * stride : place * stride + head_dim], wide[place])


@compiled
def _dots(query: Floats, keys: Floats, scores: Floats) -> None:
    """query [head_dim], keys [at least as many as scores, head_dim] -> scores."""
    num_in_fours = scores.shape[0] // 4 * 4
    for i in range(0, num_in_fours, 4):
        dots = dot_four(query, keys[i], keys[i + 1], keys[i + 2], keys[i + 3])
        scores[i], scores[i + 1], scores[i + 2], scores[i + 3] = dots
    for i in range(num_in_fours, scores.shape[0]):
        scores[i] = dot(query, keys[i])


@compiled
def _cap(scores: Floats, seen: Longs, softcap: np.float32) -> None:
    """Semantics: softcap · tanh(scores / softcap), in place where seen."""
    for token in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            capped = scores[token, head, seen[token, 0] : seen[token, 1]]
            for i in range(capped.shape[0]):
                capped[i] = softcap * tanh(capped[i] / softcap)


@compiled
def _normalise(scores: Floats, seen: Longs, sinks: Floats) -> None:
    """Softmax over what each token sees, in place. sinks [heads] or empty: logits that take weight, not values."""
    for token in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            weights = scores[token, head, seen[token, 0] : seen[token, 1]]
            highest = highest_of(weights)
            total = np.float32(0)
            if sinks.shape[0]:
                highest = max(highest, sinks[head])
                total = exp(sinks[head] - highest)
            for i in range(weights.shape[0]):
                weight = exp(weights[i] - highest)
                weights[i] = weight
                total += weight
            for i in range(weights.shape[0]):
                weights[i] /= total


@compiled
def _sum_values(
    weights: Floats,
    values: Stored,
    page_stride: int,
    num_kv_heads: int,
    pages: Ints,
    seen: Longs,
    wide: Floats,
    sums: Floats,
) -> None:
    """The values that tokens see, by `weights` [tokens, heads, positions] -> sums [tokens, heads, head_dim]."""
    num_tokens, _, head_dim = sums.shape
    page_tokens = wide.shape[0]
    first, stop = seen[0, 0], seen[num_tokens - 1, 1]
    sums[:] = np.float32(0)
    for page in range(first // page_tokens, (stop + page_tokens - 1) // page_tokens):
        page_begin = page * page_tokens
        here = slice(max(first - page_begin, 0), min(stop - page_begin, page_tokens))
        _widen_page(values[pages[page] * page_stride :], num_kv_heads * head_dim, here, wide)
        for token in range(num_tokens):
            begin, end = max(seen[token, 0], page_begin), min(seen[token, 1], page_begin + page_tokens)
            if begin >= end:
                continue
            _add_weighted(sums[token], weights[token], begin, end, wide[begin - page_begin :])


@compiled
def _add_weighted(sums: Floats, weights: Floats, begin: int, end: int, values: Floats) -> None:
    """Semantics: sums += weights[:, begin:end] values. sums [heads, head_dim], values [end - begin or more, head_dim].

    The heads take turns, so that no addition waits for the one before.
    """
    num_heads, num_in_fours = sums.shape[0], (end - begin) // 4 * 4
    for i in range(0, num_in_fours, 4):
        a, b, c, d = values[i], values[i + 1], values[i + 2], values[i + 3]
        for head in range(num_heads):
            four = weights[head, begin + i : begin + i + 4]
            add_four_scaled(sums[head], (four[0], four[1], four[2], four[3]), a, b, c, d)
    for i in range(num_in_fours, end - begin):
        for head in range(num_heads):
            add_scaled(sums[head], weights[head, begin + i], values[i])


@compiled
def _narrow_all(sums: Floats, out: Stored, first_head: int) -> None:
    """sums [tokens, heads, head_dim] -> out [tokens, all heads, head_dim], from first_head on."""
    for token in range(sums.shape[0]):
        for head in range(sums.shape[1]):
            rounded = out[token, first_head + head]
            for k in range(sums.shape[2]):
                rounded[k] = narrow(sums[token, head, k], rounded[k])
