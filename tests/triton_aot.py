"""Compiles Triton kernels to machine code on a machine without a GPU, so that tests can read what came out.

`compile_all` sends a batch to one child process (this file, run as a script), because a process that interprets Triton
cannot compile. The assembler and disassemblers are the ones inside Triton's own wheel.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

COMPILE_TIMEOUT_SECONDS = 600  # of a whole batch; a kernel takes about one second
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<text>[A-Z][^;]*);")
_LABEL = re.compile(r"^(?P<label>\.L_x_\d+):")
_BRANCH_TARGET = re.compile(r"`\((?P<label>\.L_x_\d+)\)")


@dataclass(frozen=True)
class AotKernel:
    """One kernel in one configuration. Every pointer is taken to be 16-byte aligned, as torch's allocations are."""

    module: str  # where the kernel is defined, "heddle_kernels.triton_kernels.rows"
    name: str  # the decorated function
    signature: Mapping[str, str]  # Triton's type of every runtime argument: {"x_ptr": "*bf16", "num_tokens": "i32"}
    constants: Mapping[str, int | float | bool | str | None] = field(default_factory=dict)  # constexpr arguments
    divisible_by_16: tuple[str, ...] = ()  # runtime integers known to be, as a launch finds out by itself
    num_warps: int = 4
    num_stages: int = 3
    arch: int = 90  # compute capability without the point: 80 = A100, 89 = L40S, 90 = H100 and H200


@dataclass(frozen=True)
class Compiled:
    """The machine code of one `AotKernel`, and what a multiprocessor must provide to run it."""

    kernel: AotKernel
    registers: int  # per thread
    spill_bytes: int  # per thread, of stack and local memory: 0 when everything fits in registers
    shared_bytes: int  # per program
    sass: str  # nvdisasm's text

    @functools.cached_property
    def instructions(self) -> list[str]:
        """Every instruction without its predicate, in order: "LDG.E.128 R4, desc[UR4][R2.64]"."""
        return [match["text"].strip() for match in map(_INSTRUCTION.match, self.sass.splitlines()) if match]

    def count(self, pattern: str) -> int:
        """How many instructions begin with this regular expression: `count(r"LDG\\S*\\.128")`."""
        return count(self.instructions, pattern)

    def loops(self) -> list[list[str]]:
        """The instructions of every loop, from a label to the branch back to it; an outer one includes inner ones."""
        found, instructions, label_at = list[list[str]](), list[str](), dict[str, int]()
        for line in self.sass.splitlines():
            if label := _LABEL.match(line):
                label_at[label["label"]] = len(instructions)
            if instruction := _INSTRUCTION.match(line):
                instructions.append(instruction["text"].strip())
                target = _BRANCH_TARGET.search(line)
                if instructions[-1].startswith("BRA") and target and target["label"] in label_at:
                    found.append(instructions[label_at[target["label"]] :])
        return [loop for loop in found if len(loop) > 1]  # a branch to itself is the trap after the last instruction

    def loop_with(self, pattern: str) -> list[str]:
        """The shortest loop that has an instruction beginning with this regular expression."""
        return min((loop for loop in self.loops() if count(loop, pattern)), key=len)


def count(instructions: Sequence[str], pattern: str) -> int:
    """How many of these instructions begin with the regular expression."""
    return sum(re.match(pattern, instruction) is not None for instruction in instructions)


def compile_all(kernels: Sequence[AotKernel]) -> list[Compiled]:
    """Compile a batch, once per test session; raises AssertionError with the compiler's own words if one fails."""
    outputs = _compile_json(json.dumps([asdict(kernel) for kernel in kernels]))
    return [Compiled(kernel, **output) for kernel, output in zip(kernels, json.loads(outputs), strict=True)]


@functools.cache
def _compile_json(batch: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    child = subprocess.run(
        [sys.executable, __file__],
        input=batch,
        capture_output=True,
        text=True,
        env=environment,
        timeout=COMPILE_TIMEOUT_SECONDS,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def _compile(kernel: AotKernel) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(kernel.module), kernel.name)
    types = {**kernel.signature, **dict.fromkeys(kernel.constants, "constexpr")}
    aligned = {name for name, kind in kernel.signature.items() if kind.startswith("*")} | set(kernel.divisible_by_16)
    source = ASTSource(
        fn=function,
        signature={name: types[name] for name in function.arg_names},
        constexprs={(function.arg_names.index(name),): value for name, value in kernel.constants.items()},
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", kernel.arch, 32), options=options)
    usage, sass = _read_cubin(compiled.asm["cubin"])
    return {
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "sass": sass,
    }


def _read_cubin(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage by its name, and the disassembly."""
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__path__[0]) / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", usage.stdout)}, sass.stdout


if __name__ == "__main__":
    batch = [AotKernel(**fields) for fields in json.load(sys.stdin)]
    print(json.dumps([_compile(kernel) for kernel in batch]))
