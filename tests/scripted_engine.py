"""An engine process without a model: it speaks the real messages over the real socket and answers by a script.

It echoes the prompt's byte tokens (ids below 256), one per step, then ends with `EOS`. A request's seed picks
another script; the model's name picks a fault at start-up.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import zmq

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_server.config import EngineConfig
from heddle_server.messages import (
    Abort,
    EngineStats,
    ForgetAdapter,
    FromEngine,
    Generate,
    ModelCard,
    Ready,
    Shutdown,
    StartupFailed,
    StartupProgress,
    StepOutput,
    ToEngine,
    TokenLogprobs,
    TokenOutput,
)
from heddle_server.request import Request

EOS = 256
VOCABULARY_SIZE = 264
MAX_MODEL_LEN = 64
STEP_SECONDS = 0.002

# Scripts, by a request's seed.
DIES = 1001  # two tokens, then the process is gone
NEVER_ENDS = 1002
ADAPTER_DAMAGED = 1003
DIES_AT_ONCE = 1004
CRASHES_IN_STEP = 1005

# Faults at start-up, by the model's name.
REFUSES_TO_START = "refuses"
DIES_AT_START = "dies"
HANGS_AT_START = "hangs"

SITE = Site("model.layers.0.self_attn.q_proj", "linear", 8, 8, has_bias=False)
LAYOUT = BaseLayout("scripted", "sha256:" + "0" * 64, "none", (SITE,))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--config", required=True)
    arguments = parser.parse_args()
    config = msgspec.msgpack.decode(bytes.fromhex(arguments.config), type=EngineConfig)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(arguments.socket)
    if config.model_name == DIES_AT_START:
        sys.exit(3)
    if config.model_name == HANGS_AT_START:
        time.sleep(60)
    send(socket, StartupProgress("weights", 0.01, "scripted"))
    if config.model_name == REFUSES_TO_START:
        send(socket, StartupFailed("These weights cannot be served."))
        socket.close(linger=1000)
        context.term()  # waits until the message is out
        sys.exit(2)
    send(socket, Ready(model_card()))
    ScriptedEngine(socket).serve()
    socket.close(linger=1000)
    context.term()


class ScriptedEngine:
    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self.running: dict[int, Iterator[TokenOutput]] = {}
        self.num_steps = 0
        self.num_forgotten = 0  # told as adapter evictions

    def serve(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        while True:
            while self.socket.poll(0 if self.running else None):
                match decoder.decode(self.socket.recv()):
                    case Generate(request):
                        self.running[request.request_id] = script(request)
                    case Abort(request_id):
                        self.running.pop(request_id, None)
                    case ForgetAdapter():
                        self.num_forgotten += 1
                    case Shutdown():
                        return
                self.step()
            time.sleep(STEP_SECONDS)
            self.step()

    def step(self) -> None:
        self.num_steps += 1
        outputs = [next(answer) for answer in self.running.values()]
        for output in outputs:
            if output.finish_reason:
                del self.running[output.request_id]
        send(self.socket, StepOutput(outputs, self.stats()))

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=0,
            num_pages=8,
            num_free_pages=8 - len(self.running),
            num_kv_pages=len(self.running),
            num_cached_pages=0,
            num_adapter_pages=0,
            num_resident_adapters=0,
            num_steps=self.num_steps,
            num_preemptions=0,
            num_adapter_loads=0,
            num_adapter_evictions=self.num_forgotten,
            num_prefix_queries=0,
            num_prefix_hits=0,
        )


def script(request: Request) -> Iterator[TokenOutput]:
    """The outputs of one request, one per step."""
    seed, limit = request.sampling.seed, request.sampling.max_tokens
    echo = [token_id for token_id in request.prompt_token_ids if token_id < 256]
    if seed == DIES_AT_ONCE:
        os._exit(9)
    if seed == ADAPTER_DAMAGED:
        yield TokenOutput(
            request.request_id, [], None, "error", "adapter_damaged", "The stored adapter is damaged; upload it again."
        )
    if seed == NEVER_ENDS:
        while True:
            yield token(request, ord("x"), None)
    for number, token_id in enumerate(echo, start=1):
        if seed == DIES and number == 3:
            os._exit(9)
        yield token(request, token_id, "length" if number == limit else None)
    yield token(request, EOS, "stop")


def token(request: Request, token_id: int, finish_reason: object) -> TokenOutput:
    top = tuple((token_id + rank, -0.5 - rank) for rank in range(request.sampling.num_logprobs or 0))
    logprobs = None if request.sampling.num_logprobs is None else (TokenLogprobs(-0.5, top),)
    return TokenOutput(request.request_id, [token_id], logprobs, finish_reason)  # type: ignore[arg-type]


def model_card() -> ModelCard:
    return ModelCard(
        layout=LAYOUT,
        dtype="float32",
        device="cpu",
        vocabulary_size=VOCABULARY_SIZE,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(EOS,),
        weights_bytes=3 << 20,
        weights_4bit_bytes=2 << 20,
        pool_bytes=8 << 12,
        page_bytes=1 << 12,
        page_tokens=16,
        num_pages=8,
    )


def send(socket: zmq.Socket[bytes], message: FromEngine) -> None:
    socket.send(msgspec.msgpack.encode(message))


def _exit_with_parent() -> None:
    os.read(0, 1)  # a buffered read would hold a lock that the interpreter wants at exit
    os._exit(0)


if __name__ == "__main__":
    main()
