"""Reads uploads in a process of its own, so that its memory is measured and nothing else's.

Each line on stdin holds two paths as a JSON list, a config and its weights; the answer is a line with what came out.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from adapter_samples import BASE
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.errors import AdapterError
from process_memory import peak_bytes


def main() -> None:
    for line in sys.stdin:
        config, weights = (Path(path) for path in json.loads(line))
        started = time.perf_counter()
        outcome: dict[str, object] = {"error": None, "message": None, "param": None}
        try:
            read_checkpoint(config, weights, BASE)
        except AdapterError as error:
            outcome = {"error": type(error).__name__, "message": error.message, "param": error.param}
        except Exception as error:
            outcome["error"] = repr(error)[:200]
        seconds = time.perf_counter() - started
        print(json.dumps({**outcome, "seconds": seconds, "peak_bytes": peak_bytes("self")}), flush=True)


if __name__ == "__main__":
    main()
