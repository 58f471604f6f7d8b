"""A real server on a free loopback port, in a thread of the test, in front of the scripted engine."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from byte_tokenizer import save_tokenizer
from heddle_server.api.app import create_app
from heddle_server.api.service import Service
from heddle_server.config import EngineConfig, ServerConfig

_PATHS = [path for path in sys.path if path]
SCRIPTED_ENGINE = (
    sys.executable,
    "-c",
    f"import sys; sys.path[:0] = {_PATHS!r}; import scripted_engine; scripted_engine.main()",
)


def server_config(folder: Path, *, max_model_len: int | None = None, **settings: Any) -> ServerConfig:
    """Settings of a server whose model folder holds nothing but a tokenizer, and fields of `ServerConfig`."""
    model_path = folder / "model"
    if not model_path.exists():
        save_tokenizer(model_path)
    store_path = folder / "store"
    engine = EngineConfig(
        model_path=str(model_path),
        model_name="scripted-model",
        store_path=str(store_path),
        max_model_len=max_model_len,
    )
    return ServerConfig(engine=engine, store_path=store_path, **settings)


@contextmanager
def live_server(config: ServerConfig, engine_command: Sequence[str] = SCRIPTED_ENGINE) -> Iterator[httpx.Client]:
    """A client of a server that is ready."""
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(Service(config, engine_command=engine_command)), log_config=None, timeout_graceful_shutdown=5
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=20) as client:
                wait_until(lambda: client.get("/readyz").status_code == 200)
                yield client
        finally:
            server.should_exit = True
            thread.join()


def wait_until(is_true: object, seconds: float = 20.0) -> None:
    """Returns when `is_true()` is; fails after `seconds`."""
    assert callable(is_true)
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
