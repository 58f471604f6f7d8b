"""What heddle answers: samples registered with an engine of its own, asked in several ways."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.mix import AdapterPart
from heddle_adapters.store import AdapterStore
from heddle_server.config import EngineConfig
from heddle_server.engine.engine import Engine
from heddle_server.messages import TokenOutput
from heddle_server.request import Request, SamplingParams

WAIT_SECONDS = 0.001


@dataclass
class Answer:
    """Prompt and answer, with the log-probabilities of all tokens at each place of it."""

    prompt: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)  # one [vocabulary] a token
    error: str | None = None

    def take(self, output: TokenOutput, vocabulary_size: int) -> None:
        self.token_ids += output.token_ids
        self.error = output.error_message
        for described in output.logprobs or ():
            row = torch.empty(vocabulary_size)
            ids, values = zip(*described.top, strict=True)
            row[list(ids)] = torch.tensor(values)
            self.logprobs.append(row)


class Served:
    """One engine over one base."""

    def __init__(self, model_path: Path, store_path: Path, vocabulary_size: int, **settings: Any) -> None:
        self._store_path = store_path
        self._vocabulary_size = vocabulary_size
        self._next_id = 0
        self.engine = Engine(
            EngineConfig(
                model_path=str(model_path),
                model_name="base",
                store_path=str(store_path),
                device="cpu",
                max_batch_requests=1024,
                allow_dense_adapters=True,
                **settings,
            )
        )
        self.checkpoints: dict[str, Checkpoint] = {}

    def register(self, folders: Mapping[str, Path]) -> dict[str, str]:
        """Upload what lies in these folders; each one's refusal, if there is one."""
        refusals = {}
        with AdapterStore(self._store_path) as store:
            for name, folder in folders.items():
                config, weights = (folder / "adapter_config.json").read_bytes(), folder / "adapter_model.safetensors"
                try:
                    checkpoint = read_checkpoint(config, weights, self.engine.model.layout)
                    store.put(name_in_store(name), checkpoint, config, weights)
                    self.checkpoints[name] = checkpoint
                except Exception as error:
                    refusals[name] = str(error)
        return refusals

    def ask(self, questions: Sequence[tuple[str, list[int]]], num_new_tokens: int) -> list[Answer]:
        """All (sample, prompt) at once, the base by the name ""; their answers in that order."""
        answers = dict[int, Answer]()
        for name, prompt in questions:
            request = self._request(name, prompt, num_new_tokens, num_logprobs=self._vocabulary_size)
            answers[request.request_id] = Answer(prompt)
            self.engine.add(request)
        while self.engine.has_requests:
            num_steps = self.engine.num_steps
            for output in self.engine.step():
                answers[output.request_id].take(output, self._vocabulary_size)
            if self.engine.num_steps == num_steps:
                time.sleep(WAIT_SECONDS)
            self.engine.check_integrity()
        return list(answers.values())

    def seconds_of_steps(self, questions: Sequence[tuple[str, list[int]]], num_steps: int) -> float:
        """Of so many decode steps with all of them, one request each."""
        requests = [self._request(name, prompt, 2 * num_steps) for name, prompt in questions]
        waiting = {request.request_id for request in requests}
        for request in requests:
            self.engine.add(request)
        while waiting:
            for output in self.engine.step():
                assert output.error_message is None, output.error_message
                waiting.discard(output.request_id)
        started = time.perf_counter()
        for _ in range(num_steps):
            self.engine.step()
        seconds = time.perf_counter() - started
        for request in requests:
            self.engine.abort(request.request_id)
        return seconds

    def _request(self, name: str, prompt: list[int], max_tokens: int, **sampling: Any) -> Request:
        self._next_id += 1
        checkpoint = self.checkpoints.get(name)
        return Request(
            request_id=self._next_id,
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **sampling),
            adapters=() if checkpoint is None else (AdapterPart(checkpoint.digest),),
            num_virtual_tokens=0 if checkpoint is None else checkpoint.num_virtual_tokens,
        )

    def page_bytes(self) -> dict[str, int]:
        """Of the pool, by every sample on the device, page ends included."""
        cached = {adapter.adapter_digest: adapter for adapter in self.engine.describe_cache(0).adapters}
        return {
            name: cached[checkpoint.digest].num_pages * self.engine.model.page_bytes
            for name, checkpoint in self.checkpoints.items()
            if checkpoint.digest in cached
        }

    def forget(self) -> None:
        """Let go of all adapters, on the device and beside it: the next request makes their rows anew."""
        for checkpoint in self.checkpoints.values():
            self.engine.forget_adapter(checkpoint.digest)

    def close(self) -> None:
        self.engine.close()


def name_in_store(name: str) -> str:
    """A sample's name as an adapter may be called."""
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")
