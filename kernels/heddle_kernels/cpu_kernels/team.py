"""One kernel on several threads: torch's own, so that two pools never fight over the cores.

torch computes on the threads of OpenMP, which wait for more work for a while before they sleep. A second pool would
have to take the cores from them; a kernel that asks OpenMP itself finds them ready. A round costs about 2 µs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

Tasks = NDArray[np.int64]  # [2]: the next task, the next member of the team

_BYTES, _INT32, _INT64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
_NEXT_TASK, _NEXT_MEMBER = 0, 1


def team_size() -> int:
    """Threads that one operation may use."""
    return torch.get_num_threads()


def new_tasks() -> Tasks:
    """For one round: none is taken yet."""
    return np.zeros(2, np.int64)


@intrinsic  # type: ignore[untyped-decorator]
def in_parallel(_context: Any, num_threads: Any, kernel: Any, arguments: Any) -> Any:
    """Run a compiled kernel with the same arguments, a tuple, on that many threads; returns when all have.

    The members share the work by `next_task`: who was held up takes fewer tasks.
    """
    call = kernel.get_call_type(_context, tuple(arguments), {})

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        num_members, _, given = values
        shared = cgutils.alloca_once_value(builder, given)
        member = ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [_BYTES]), builder.module.get_unique_name("member")
        )
        member.linkage = "internal"
        body = ir.IRBuilder(member.append_basic_block())
        passed = body.load(body.bitcast(member.args[0], shared.type))
        overload = kernel.dispatcher.overloads[call.args]
        context.active_code_library.add_linking_library(overload.library)
        context.call_conv.call_function(
            body,
            context.declare_function(builder.module, overload.fndesc),
            call.return_type,
            call.args,
            [body.extract_value(passed, i) for i in range(len(arguments))],
        )
        body.ret_void()
        round_type = ir.FunctionType(ir.VoidType(), [member.type, _BYTES, _INT32, _INT32])
        builder.call(
            cgutils.get_or_insert_function(builder.module, round_type, "GOMP_parallel"),
            [member, builder.bitcast(shared, _BYTES), builder.trunc(num_members, _INT32), _INT32(0)],
        )
        return context.get_dummy_value()

    return types.void(types.int64, kernel, arguments), generate


def _taking(place: int) -> Callable[..., Any]:
    def take(_context: Any, tasks: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            counters = context.make_array(tasks)(context, builder, arguments[0]).data
            return builder.atomic_rmw("add", builder.gep(counters, [_INT64(place)]), _INT64(1), "monotonic")

        return types.int64(tasks), generate

    return take


next_task = intrinsic(_taking(_NEXT_TASK))  # tasks -> the number of a task that nobody else of this round gets
next_member = intrinsic(_taking(_NEXT_MEMBER))  # tasks -> this thread's number in the team, to be asked once


def _run_alone(member: int, shared: int, _num_threads: int, _flags: int) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(member)(shared)


_alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(_run_alone)
if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):  # a torch without OpenMP
    binding.add_symbol("GOMP_parallel", ctypes.cast(_alone, ctypes.c_void_p).value)
