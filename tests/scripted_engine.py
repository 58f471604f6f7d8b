"""An engine process without a model: it speaks the real messages over the real socket and answers by a script.

It echoes the prompt's byte tokens (ids below 256), one per step, then ends with `EOS`. A request's seed picks
another script; the model's name picks a fault at start-up. An adapter comes to the device when it is first asked for
or pinned, takes one page there, and goes to the host tier when it is not pinned any more.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import msgspec
import zmq

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.tier import AdapterMove, CachedAdapter, Tier, farthest
from heddle_server.config import EngineConfig
from heddle_server.messages import (
    Abort,
    AdmissionReport,
    CacheReport,
    DescribeCache,
    EngineStats,
    ForgetAdapter,
    FromEngine,
    Generate,
    ModelCard,
    PinAdapters,
    PrepareAdapter,
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
PAGE_BYTES = 1 << 12
NUM_PAGES = 8
ADAPTER_BYTES = 3 << 10  # of its one page
LOAD_SECONDS = 0.125  # what a load is said to have taken

# Scripts, by a request's seed.
DIES = 1001  # two tokens, then the process is gone
NEVER_ENDS = 1002
ADAPTER_DAMAGED = 1003
DIES_AT_ONCE = 1007
WAITS_TOO = 1004  # waits for ever, as the next one does
NEVER_STARTS = 1005
DESCRIBES_NOTHING = 1006  # once it has run, questions about the cache get no answer

# Faults at start-up, by the model's name.
REFUSES_TO_START = "refuses"
DIES_AT_START = "dies"
HANGS_AT_START = "hangs"

SITE = Site("model.layers.0.self_attn.q_proj", "linear", 8, 8, has_bias=False)
LAYOUT = BaseLayout("scripted", "sha256:" + "0" * 64, "nf4", (SITE,))


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
    send(socket, Ready(model_card(config.max_model_len or MAX_MODEL_LEN)))
    ScriptedEngine(socket).serve()
    socket.close(linger=1000)
    context.term()


class ScriptedEngine:
    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self.running: dict[int, Iterator[TokenOutput | None]] = {}
        self.requests: dict[int, Request] = {}
        self.is_mute = False
        self.num_steps = 0
        self.num_tokens = 0
        self.num_forgotten = 0  # told as adapter evictions
        self.tiers: dict[str, Tier] = {}
        self.pinned: dict[str, str] = {}  # tenants by digest
        self.uses: Counter[str] = Counter()
        self.found: Counter[Tier] = Counter()  # requests by where their adapter was
        self.moves: list[AdapterMove] = []

    def serve(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        while True:
            while self.socket.poll(0 if self.running else None):
                match decoder.decode(self.socket.recv()):
                    case Generate(request):
                        self.add(request)
                    case Abort(request_id):
                        self.running.pop(request_id, None)
                        self.requests.pop(request_id, None)
                    case ForgetAdapter(digest):
                        self.num_forgotten += 1
                        self.move(digest, "disk")
                    case PrepareAdapter():
                        pass  # there is nothing to compile
                    case PinAdapters(tenants):
                        for digest in set(self.pinned) - set(tenants):
                            self.move(digest, "host")
                        self.pinned = tenants
                        for digest in tenants:
                            self.move(digest, "device")
                    case DescribeCache(query_id):
                        if not self.is_mute:
                            send(self.socket, CacheReport(query_id, "cost", self.adapters(), self.stats()))
                    case Shutdown():
                        return
                self.step()
            time.sleep(STEP_SECONDS)
            self.step()

    def add(self, request: Request) -> None:
        self.is_mute |= request.sampling.seed == DESCRIBES_NOTHING
        tier = farthest([self.tiers.get(part.digest, "disk") for part in request.adapters])
        if tier is not None:
            self.found[tier] += 1
        for part in request.adapters:
            self.uses[part.digest] += 1
            self.move(part.digest, "device")
        self.requests[request.request_id] = request
        self.running[request.request_id] = script(request, tier)

    def move(self, digest: str, target: Tier) -> None:
        source = self.tiers.get(digest, "disk")
        if source != target:
            self.tiers[digest] = target
            seconds = LOAD_SECONDS if target == "device" else 0.0
            self.moves.append(AdapterMove(digest, source, target, PAGE_BYTES, seconds))

    def step(self) -> None:
        self.num_steps += 1
        outputs = [output for answer in self.running.values() if (output := next(answer)) is not None]
        self.num_tokens += len(outputs)
        for output in outputs:
            if output.finish_reason:
                del self.running[output.request_id]
                del self.requests[output.request_id]
        moves, self.moves = self.moves, []
        send(self.socket, StepOutput(outputs, moves, self.stats()))

    def adapters(self) -> list[CachedAdapter]:
        parts = [part.digest for request in self.requests.values() for part in request.adapters]
        return [
            CachedAdapter(
                adapter_digest=digest,
                tier=tier,
                num_pages=1,
                size_bytes=PAGE_BYTES,
                num_references=parts.count(digest),
                num_waiting=0,
                is_pinned=digest in self.pinned,
                num_uses=self.uses[digest],
                idle_seconds=0.0 if digest in parts else 1.5,
            )
            for digest, tier in self.tiers.items()
            if tier != "disk"
        ]

    def stats(self) -> EngineStats:
        num_waiting = sum(request.sampling.seed in (WAITS_TOO, NEVER_STARTS) for request in self.requests.values())
        num_running = len(self.running) - num_waiting
        tiers = list(self.tiers.values())
        return EngineStats(
            num_running=num_running,
            num_waiting=num_waiting,
            num_pages=NUM_PAGES,
            num_free_pages=max(0, NUM_PAGES - num_running - tiers.count("device")),
            num_kv_pages=num_running,
            num_cached_pages=0,
            num_adapter_pages=tiers.count("device"),
            num_resident_adapters=tiers.count("device"),
            num_steps=self.num_steps,
            num_preemptions=0,
            num_pinned_pages=len(self.pinned),
            num_loading_pages=0,
            adapter_used_bytes=ADAPTER_BYTES * tiers.count("device"),
            host_bytes=PAGE_BYTES * tiers.count("host"),
            host_budget_bytes=1 << 20,
            num_host_adapters=tiers.count("host"),
            num_device_hits=self.found["device"],
            num_host_hits=self.found["host"],
            num_misses=self.found["disk"],
            num_adapter_loads=self.found["host"] + self.found["disk"],
            num_adapter_evictions=self.num_forgotten,
            num_host_evictions=0,
            num_prefix_queries=0,
            num_prefix_hits=0,
            num_prefix_evictions=0,
            num_segments=self.num_steps,
            num_computed_tokens=self.num_tokens,
            step_seconds=self.num_steps * STEP_SECONDS,
            host_seconds=0.0,
        )


def script(request: Request, tier: Tier | None) -> Iterator[TokenOutput | None]:
    """The outputs of one request, one per step; the first says where its adapter was."""
    load_seconds = 0.0 if tier in (None, "device") else LOAD_SECONDS
    admission: AdmissionReport | None = AdmissionReport(tier, load_seconds, load_seconds + STEP_SECONDS)
    for output in answer(request):
        if output is not None and output.token_ids and admission is not None:
            output, admission = (
                msgspec.structs.replace(output, admission=admission, prompt_logprobs=prompt_logprobs(request)),
                None,
            )
        yield output


def prompt_logprobs(request: Request) -> tuple[TokenLogprobs, ...] | None:
    wanted = request.sampling.num_prompt_logprobs
    if wanted is None:
        return None
    told = request.prompt_token_ids[1:]
    return tuple(TokenLogprobs(-0.25, ((token_id, -0.25),) if wanted else ()) for token_id in told)


def answer(request: Request) -> Iterator[TokenOutput | None]:
    seed, limit = request.sampling.seed, request.sampling.max_tokens
    echo = [token_id for token_id in request.prompt_token_ids if token_id < 256]
    if seed == DIES_AT_ONCE:
        os._exit(9)
    if seed == ADAPTER_DAMAGED:
        yield TokenOutput(
            request.request_id, [], None, "error", "adapter_damaged", "The stored adapter is damaged; upload it again."
        )
    if seed in (WAITS_TOO, NEVER_STARTS):
        while True:
            yield None
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


def model_card(max_model_len: int = MAX_MODEL_LEN) -> ModelCard:
    return ModelCard(
        layout=LAYOUT,
        dtype="float32",
        device="cpu",
        vocabulary_size=VOCABULARY_SIZE,
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
        weights_bytes=3 << 20,
        quantized_bytes=2 << 20,
        pool_bytes=NUM_PAGES * PAGE_BYTES,
        page_bytes=PAGE_BYTES,
        page_tokens=16,
        num_pages=NUM_PAGES,
    )


def send(socket: zmq.Socket[bytes], message: FromEngine) -> None:
    socket.send(msgspec.msgpack.encode(message))


def _exit_with_parent() -> None:
    os.read(0, 1)  # a buffered read would hold a lock that the interpreter wants at exit
    os._exit(0)


if __name__ == "__main__":
    main()
