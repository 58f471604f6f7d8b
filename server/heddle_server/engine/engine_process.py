"""The engine process (`python -m heddle_server.engine.engine_process`): messages in, steps, messages out.

Standard input carries nothing; its end means that the API process is gone, and the engine goes too.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import threading

import msgspec
import zmq

from heddle_server.config import ConfigError, EngineConfig
from heddle_server.engine.engine import Engine
from heddle_server.messages import (
    Abort,
    DescribeCache,
    ForgetAdapter,
    FromEngine,
    Generate,
    PinAdapters,
    PrepareAdapter,
    Ready,
    Shutdown,
    StartupFailed,
    StartupProgress,
    StepOutput,
    ToEngine,
)

EXIT_CONFIG = 2
NEVER = 2**31 - 1  # collections of middle-aged objects before one of all


class Channel:
    """The socket to the API process, and a way for the loader thread to wake a waiting engine."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # never drop or block: the API process bounds what is in flight
        self._socket.connect(address)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def receive(self, wait: bool) -> list[ToEngine]:
        """Everything that has arrived; with `wait`, not before something has, or the loader has called."""
        ready = dict(self._poller.poll(None if wait else 0))
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        messages: list[ToEngine] = []
        while True:
            try:
                messages.append(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def wake(self) -> None:
        """Callable from any thread."""
        os.write(self._wake_write, b"!")

    def close(self) -> None:
        """Returns when the last message is out, or after a second."""
        self._socket.close(linger=1000)
        self._context.term()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", required=True, help="ZeroMQ address to connect to")
    parser.add_argument("--config", required=True, help="EngineConfig as hexadecimal msgpack")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="engine: %(message)s")
    config = msgspec.msgpack.decode(bytes.fromhex(arguments.config), type=EngineConfig)
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    channel = Channel(arguments.socket)
    try:
        engine = Engine(
            config,
            on_progress=lambda phase, seconds, detail: channel.send(StartupProgress(phase, seconds, detail)),
            on_loaded=channel.wake,
        )
    except Exception as error:  # the same weights and settings would fail the same way again: say so, once
        if not isinstance(error, ConfigError | OSError):
            logging.exception("the engine cannot start")
        channel.send(StartupFailed(str(error) or type(error).__name__))
        channel.close()
        sys.exit(EXIT_CONFIG)
    quieten_garbage_collection()
    channel.send(Ready(engine.model))
    serve(engine, channel)
    engine.close()
    channel.close()


def quieten_garbage_collection() -> None:
    """Never again look for cycles among all objects: with a base and 50,000 cached pages that stops a step for 0.5 s.

    What is loaded by now stays, and what steps make ends by its reference counts; young objects are still looked at.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, NEVER)


def serve(engine: Engine, channel: Channel) -> None:
    """Step while there is something to compute, else wait for a message or a loaded adapter."""
    is_idle = True
    while True:
        for message in channel.receive(wait=is_idle):
            match message:
                case Generate(request):
                    engine.add(request)
                case Abort(request_id):
                    engine.abort(request_id)
                case ForgetAdapter(digest):
                    engine.forget_adapter(digest)
                case PrepareAdapter(digest):
                    engine.prepare_adapter(digest)
                case PinAdapters(tenants):
                    engine.pin_adapters(tenants)
                case DescribeCache(query_id):
                    channel.send(engine.describe_cache(query_id))
                case Shutdown():
                    return
        num_steps = engine.num_steps
        outputs = engine.step()
        channel.send(StepOutput(outputs, engine.take_moves(), engine.stats()))
        is_idle = engine.num_steps == num_steps and not outputs  # a failure may have made room for who waits


def _exit_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through sys.stdin: a thread waiting in its buffer stops an orderly exit
    os._exit(0)


if __name__ == "__main__":
    main()
