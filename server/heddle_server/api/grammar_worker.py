"""A process that tries grammars out (`python -m heddle_server.api.grammar_worker`), so that none can hurt the server.

What a client sends as a grammar may take the compiler long, much memory, or its whole stack. Here it costs at most
this process, which `grammar_checker` ends and starts again. Frames on standard input and output are four bytes of
length and as many of UTF-8: a grammar in, what is wrong with it out, nothing if it can be used.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec

from heddle_server.grammar_compiler import MAX_COMPILE_BYTES, GrammarCompiler, GrammarRefused

LENGTH_BYTES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, type=Path, help="tokenizer.json of the base")
    parser.add_argument("--vocabulary-size", required=True, type=int)
    parser.add_argument("--eos-token-ids", required=True, help="JSON list")
    arguments = parser.parse_args()
    eos_token_ids = msgspec.json.decode(arguments.eos_token_ids, type=list[int])
    compiler = GrammarCompiler(arguments.tokenizer, arguments.vocabulary_size, eos_token_ids)
    _limit_memory()
    send(sys.stdout.buffer, "")  # ready
    while (grammar := receive(sys.stdin.buffer)) is not None:
        send(sys.stdout.buffer, _refusal(compiler, grammar))


def _refusal(compiler: GrammarCompiler, grammar: str) -> str:
    try:
        matcher = compiler.compile(grammar)
    except GrammarRefused as error:
        return str(error)
    matcher.compute_bitmask()  # some of the work is left to the first token
    return matcher.get_error()


def send(pipe: BinaryIO, text: str) -> None:
    """One frame."""
    pipe.write(frame(text))
    pipe.flush()


def frame(text: str) -> bytes:
    content = text.encode()
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def receive(pipe: BinaryIO) -> str | None:
    """The next frame; None at the end."""
    length = pipe.read(LENGTH_BYTES)
    return pipe.read(int.from_bytes(length, "little")).decode() if len(length) == LENGTH_BYTES else None


def _limit_memory() -> None:
    """What it holds now and what one grammar may take more."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size_bytes = pages * resource.getpagesize() + MAX_COMPILE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))


if __name__ == "__main__":
    main()
