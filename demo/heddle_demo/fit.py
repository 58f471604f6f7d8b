"""The training loop, one for the base and for adapters: seeded batches, AdamW, cosine decay, checkpoints.

A step depends on nothing but its number and the optimiser's state, so an interrupted run ends where another would.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from heddle_demo.chat import PAD, Chat, encode
from heddle_demo.stream import ChatStream

IGNORED = -100
MAX_GRADIENT_NORM = 1.0
STEPS_PER_CHECKPOINT = 50
ROW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train."""

    num_steps: int
    peak_learning_rate: float
    num_warmup_steps: int
    weight_decay: float = 0.0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: a linear warm-up, then a cosine down to 2 % of the peak."""
        if step < self.num_warmup_steps:
            return self.peak_learning_rate * (step + 1) / self.num_warmup_steps
        done = (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps)
        return self.peak_learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, slots=True)
class Batch:
    """Chats in rows. Positions start again at 0 with every chat; transformers then keeps its attention to itself."""

    token_ids: Tensor  # [num_rows, longest]
    positions: Tensor  # [num_rows, longest]
    labels: Tensor  # [num_rows, longest], IGNORED where the model does not write
    is_packed: bool  # or one chat a row


def fit(
    model: nn.Module,
    tokenizer: Tokenizer,
    stream: ChatStream,
    schedule: Schedule,
    checkpoint: Path,
    report: Callable[[int, float], None],
    *,
    is_packed: bool = True,
) -> None:
    """Train the model's trainable parameters in place; `report(step, loss)` is called after every step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    first_step = _resume(checkpoint, parameters, optimizer)
    model.train()
    for step in range(first_step, schedule.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        batch = collate(tokenizer, stream.batch(step), is_packed=is_packed)
        loss = answer_loss(logits(model, batch), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(step, loss.item())
        if (step + 1) % STEPS_PER_CHECKPOINT == 0:
            _save(checkpoint, step + 1, parameters, optimizer)
    model.eval()


def collate(tokenizer: Tokenizer, chats: Sequence[Chat], *, is_packed: bool = True) -> Batch:
    """Lay the chats end to end in rows of about ROW_TOKENS: a third of the work of padding each to the longest.

    Unpacked, every chat has a row to itself, as virtual tokens need it: PEFT puts them before rows, not before chats.
    """
    row_tokens = ROW_TOKENS if is_packed else 0
    rows: list[list[tuple[int, int, int]]] = [[]]
    for chat in chats:
        ids, is_answer = encode(tokenizer, chat)
        if rows[-1] and len(rows[-1]) + len(ids) > row_tokens:
            rows.append([])
        targets = [token_id if written else IGNORED for token_id, written in zip(ids, is_answer, strict=True)]
        rows[-1] += zip(ids, range(len(ids)), targets, strict=True)
    # Padding counts positions from 0 again, so it belongs to no chat.
    padding = (tokenizer.token_to_id(PAD), 0, IGNORED)
    longest = max(len(row) for row in rows)
    packed = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    token_ids, positions, labels = packed.unbind(-1)
    return Batch(token_ids, positions, labels, is_packed)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model on a batch; returns `[num_rows, longest, vocabulary]`."""
    # One chat a row needs no positions, and PEFT, which counts on from its virtual tokens, takes none.
    positions = batch.positions if batch.is_packed else None
    output = model(input_ids=batch.token_ids, position_ids=positions, use_cache=False).logits
    assert isinstance(output, Tensor)
    return output[:, -batch.token_ids.shape[1] :]  # prompt tuning also has logits of its virtual tokens


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy over the tokens that the model has to write."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _save(checkpoint: Path, step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint.with_suffix(".partial")
    torch.save({"step": step, "parameters": parameters, "optimizer": optimizer.state_dict()}, partial)
    partial.replace(checkpoint)


def _resume(checkpoint: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    if not checkpoint.exists():
        return 0
    saved = torch.load(checkpoint, weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])
