"""A server in a process of its own, in front of the scripted engine with the base of `adapter_samples`.

Started with a folder and an upload limit; prints its port when it is ready and ends with its stdin.
"""

from __future__ import annotations

import sys
from pathlib import Path

import adapter_samples
import scripted_engine
from live_server import live_server, server_config


def main() -> None:
    folder, max_upload_bytes = Path(sys.argv[1]), int(sys.argv[2])
    engine = (sys.executable, "-m", "hostile_server", "engine")
    with live_server(server_config(folder, max_upload_bytes=max_upload_bytes), engine) as client:
        print(client.base_url.port, flush=True)
        sys.stdin.read()


def engine_main() -> None:
    scripted_engine.LAYOUT = adapter_samples.BASE
    scripted_engine.main()


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        del sys.argv[1]
        engine_main()
    else:
        main()
