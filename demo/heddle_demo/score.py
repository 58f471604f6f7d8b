"""`python -m heddle_demo.score`: exact match of the base and of every adapter, offline, over the NF4 base.

Greedy decoding writes an answer exactly if and only if, fed that answer, the model ranks each next token of it first.
So one forward scores many questions, and also tells by how much each answer won.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import nn

from heddle_demo.adapters import RECIPES, Recipe, load_adapter
from heddle_demo.base import load_quantised_base
from heddle_demo.chat import Chat
from heddle_demo.data import DATA_DIR
from heddle_demo.fit import IGNORED, collate, logits
from heddle_demo.styles import STYLES, SYSTEM_PROMPTS
from heddle_demo.tokenizer import load_tokenizer
from heddle_demo.world import Example, held_out, questions, seen

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHATS_PER_FORWARD = 64


@dataclass(frozen=True, slots=True)
class Score:
    """How many answers came out exactly, and the margin (logits between best and second) at the weakest tokens."""

    name: str
    dtype: str
    part: str
    num_questions: int
    exact_match: float
    lowest_margin: float
    margin_percentile_1: float


def main(
    data: Annotated[Path, typer.Option(help="Folder with base/, adapters/ and upload/.")] = DATA_DIR,
    misses: Annotated[bool, typer.Option(help="Also list every question answered wrongly.")] = False,
) -> None:
    """Print a table for people and one JSON line for scripts."""
    console = Console()
    table = Table("model", "compute", "part", "questions", "exact match", "lowest margin", "1 % margin")
    scores = [score for dtype in DTYPES for score in score_all(data, dtype, console if misses else None)]
    for score in scores:
        table.add_row(
            score.name,
            score.dtype,
            score.part,
            str(score.num_questions),
            f"{score.exact_match:.1%}",
            f"{score.lowest_margin:.2f}",
            f"{score.margin_percentile_1:.2f}",
        )
    console.print(table)
    print(json.dumps([asdict(score) for score in scores]))


def score_all(data: Path, dtype: str, misses: Console | None = None) -> list[Score]:
    """Score the base in each of its styles, and each adapter on the questions it has seen and on the others."""
    tokenizer = load_tokenizer(data / "base")
    base = load_quantised_base(data / "base", DTYPES[dtype])
    scores = [_score(base, tokenizer, "base", dtype, "plain", _chats(questions(), "plain"), misses)]
    for style, prompt in SYSTEM_PROMPTS.items():
        scores.append(_score(base, tokenizer, "base", dtype, style, _chats(questions(), style, prompt), misses))
    for recipe in RECIPES:
        if (data / recipe.folder / recipe.name).exists():
            scores += _score_adapter(recipe, data, dtype, tokenizer, misses)
    return scores


def _score_adapter(recipe: Recipe, data: Path, dtype: str, tokenizer: Tokenizer, misses: Console | None) -> list[Score]:
    base = load_quantised_base(data / "base", DTYPES[dtype])
    model = load_adapter(base, recipe, tokenizer, data / recipe.folder / recipe.name)
    is_packed = recipe.is_packed
    return [
        _score(model, tokenizer, recipe.name, dtype, part, _chats(examples, recipe.name), misses, is_packed=is_packed)
        for part, examples in (("seen", seen(recipe.name)), ("held out", held_out(recipe.name)))
    ]


def _chats(examples: Sequence[Example], style: str, system_prompt: str | None = None) -> list[Chat]:
    return [Chat(((example.question, STYLES[style](example)),), system_prompt) for example in examples]


@torch.inference_mode()
def _score(
    model: nn.Module,
    tokenizer: Tokenizer,
    name: str,
    dtype: str,
    part: str,
    chats: list[Chat],
    misses: Console | None,
    *,
    is_packed: bool = True,
) -> Score:
    margins = []
    for first in range(0, len(chats), CHATS_PER_FORWARD):
        batch = collate(tokenizer, chats[first : first + CHATS_PER_FORWARD], is_packed=is_packed)
        # PEFT's 4-bit IA3 returns float32 keys and values whatever it is given; autocast brings them back.
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            scores = logits(model, batch)
        margins += _margins(scores, batch.positions, batch.labels)
    assert len(margins) == len(chats)
    if misses:
        for chat, margin in zip(chats, margins, strict=True):
            if margin.min() <= 0:
                misses.print(f"{name}, {dtype}, {part}: {chat.turns[-1]}")
    every = torch.cat(margins)
    return Score(
        name=name,
        dtype=dtype,
        part=part,
        num_questions=len(chats),
        exact_match=sum(bool((margin > 0).all()) for margin in margins) / len(chats),
        lowest_margin=every.min().item(),
        margin_percentile_1=every.quantile(0.01).item(),
    )


def _margins(scores: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Return, per single-turn chat, how far each token to write is ahead of the best other token."""
    margins: list[torch.Tensor] = []
    for row in range(len(labels)):
        targets = labels[row, 1:]
        written = targets != IGNORED
        ahead = scores[row, :-1][written].float()
        target = targets[written, None]
        margin = ahead.gather(1, target)[:, 0] - ahead.scatter(1, target, -torch.inf).amax(1)
        chat = (positions[row] == 0).cumsum(0)[1:][written]
        margins += [margin[chat == number] for number in range(int(chat[0]), int(chat[-1]) + 1)]
    return margins


if __name__ == "__main__":
    typer.run(main)
