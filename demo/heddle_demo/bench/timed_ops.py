"""Stopwatches around the engine's operations, on the CPU, where a call returns when its work is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import nn

from heddle_kernels import dispatch
from heddle_server.engine.base_linear import DenseForMany

BASE, HEAD, ATTENTION, ROWS, ROW_PLAN = "4-bit linears", "output layer", "attention", "adapter rows", "row plan"
PARTS = (BASE, HEAD, ATTENTION, ROWS, ROW_PLAN)
PART_OF_OP = {
    "write_kv": ATTENTION,
    "paged_attention": ATTENTION,
    "shrink": ROWS,
    "expand_add": ROWS,
    "scale_input": ROWS,
    "plan_rows": ROW_PLAN,
    "plan_rows_into": ROW_PLAN,
}
# Of a model in NF4 only the output layer is in 16 bits. One linear may call another.
PART_OF_LINEAR: dict[Any, str] = {DenseForMany: BASE, Linear4bit: BASE, nn.Linear: HEAD}


class Stopwatch:
    """Seconds by part, of all calls so far."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._is_running = False

    def reset(self) -> None:
        """From now on."""
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time added to `part`, unless it is called by another that is timed."""

        def call(*arguments: Any, **options: Any) -> Any:
            if self._is_running:
                return function(*arguments, **options)
            self._is_running, started = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += time.perf_counter() - started
                self._is_running = False

        return call


class TimedOps:
    """The operations of a backend under a stopwatch."""

    def __init__(self, ops: Any, stopwatch: Stopwatch) -> None:
        self._ops = ops
        for name, part in PART_OF_OP.items():
            if hasattr(ops, name):
                setattr(self, name, stopwatch.timed(part, getattr(ops, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


@contextmanager
def watched(stopwatch: Stopwatch) -> Iterator[None]:
    """Engines that start within have timed operations; the base's linears are timed until it ends."""
    backends, forwards = dict(dispatch.BACKENDS), {kind: kind.forward for kind in PART_OF_LINEAR}
    for name, (why_not, make) in backends.items():
        dispatch.BACKENDS[name] = (why_not, _timed_make(make, stopwatch))
    for kind, part in PART_OF_LINEAR.items():
        kind.forward = _as_method(stopwatch.timed(part, forwards[kind]))
    try:
        yield
    finally:
        dispatch.BACKENDS.update(backends)
        for kind, forward in forwards.items():
            kind.forward = forward


def _timed_make(make: Callable[..., Any], stopwatch: Stopwatch) -> Callable[..., Any]:
    return lambda *arguments: TimedOps(make(*arguments), stopwatch)


def _as_method(function: Callable[..., Any]) -> Any:
    def forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        return function(self, *arguments, **options)

    return forward
