"""Reads JSON objects that strangers uploaded: the work and the values it can produce are bounded.

The standard reader takes the last of duplicate keys, NaN and Infinity, integers of thousands of digits and
nesting down to the interpreter's stack limit. Here each of these is an `InvalidAdapter`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import NoReturn, TypeAlias

from heddle_adapters.errors import InvalidAdapter, quoted

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_INTEGER_DIGITS = 19  # any 63-bit count, offset or size
# An empty object takes 3 bytes of text and 64 of memory, so 8 MiB of text could take 200. A header of 16,384 tensors
# of four dimensions has 49,153 objects and lists and 163,841 values; so many take 30 MiB at worst.
MAX_CONTAINERS = 50_000
MAX_VALUES = 200_000
MAX_WIDE_BYTES = 2**21  # one emoji makes Python keep all of a text in four bytes a character, as text and as value


def parse_object(data: bytes, *, what: str, param: str, max_members: int | None = None) -> dict[str, Json]:
    """The JSON object in `data`, which is UTF-8 and which the caller has bounded in length.

    `what` names the text in messages, `param` the upload's part that it came from; no object in it may have more
    than `max_members` members. Raises `InvalidAdapter`.
    """

    def refuse(problem: str) -> NoReturn:
        raise InvalidAdapter(f"{what} {problem}; save the adapter again with PEFT.", param=param)

    def unique_members(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        if max_members is not None and len(pairs) > max_members:
            refuse(f"has an object of {len(pairs)} members, more than the {max_members} allowed")
        members = dict(pairs)
        if len(members) != len(pairs):
            (repeated, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            refuse(f"has the key {quoted(repeated)} more than once")
        return members

    def bounded_integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
            refuse(f"has an integer of {len(digits)} digits, more than the {MAX_INTEGER_DIGITS} allowed")
        return int(digits)

    def finite_number(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            refuse(f"has the number {quoted(text)}, which is not finite")
        return number

    # Every value but the outermost follows a bracket or a comma; those inside of strings count too.
    num_containers = data.count(b"{") + data.count(b"[")
    if num_containers > MAX_CONTAINERS or num_containers + data.count(b",") > MAX_VALUES:
        refuse(f"has more than the {MAX_CONTAINERS} objects and lists or the {MAX_VALUES} values allowed")
    if len(data) > MAX_WIDE_BYTES and not (data.isascii() and b"\\u" not in data):
        refuse(f"is over {MAX_WIDE_BYTES} bytes long and not all plain ASCII")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique_members,
            parse_int=bounded_integer,
            parse_float=finite_number,
            parse_constant=finite_number,
        )
    except UnicodeDecodeError:
        refuse("is not UTF-8 text")
    except json.JSONDecodeError as error:
        refuse(f"is not JSON: {error}")
    except RecursionError:
        refuse("is nested too deeply")
    if not isinstance(value, dict):
        refuse(f"must be a JSON object, not a {type(value).__name__}")
    return value
