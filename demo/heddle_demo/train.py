"""`python -m heddle_demo.train`: make the demo's tokenizer, base and adapters. Finished stages are skipped."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from queue import Empty, Queue
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from heddle_demo.adapters import RECIPES, Recipe, train_adapter
from heddle_demo.base import SCHEDULE, train_base
from heddle_demo.data import DATA_DIR
from heddle_demo.tokenizer import load_tokenizer, train_tokenizer

# Set, not left to the machine: the number of threads decides the order of sums, and so the trained bits.
# An adapter's steps are too small to share: one thread each, and two adapters side by side.
NUM_BASE_THREADS = 2
NUM_ADAPTER_THREADS = 1
NUM_ADAPTERS_AT_ONCE = 2


def main(
    only: Annotated[str, typer.Option(help="Train only this: base, adapters, or one adapter's name.")] = "",
    out: Annotated[Path, typer.Option(help="Folder that receives base/, adapters/ and upload/.")] = DATA_DIR,
) -> None:
    """Train what is not there yet; an interrupted stage goes on from its last checkpoint."""
    known = ("base", "adapters", *(recipe.name for recipe in RECIPES))
    if only and only not in known:
        raise typer.BadParameter(f"{only!r} is not one of {', '.join(known)}", param_hint="--only")
    transformers_logging.disable_progress_bar()
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        if only in ("", "base"):
            _base_stage(out, progress)
        _adapter_stages([recipe for recipe in RECIPES if only in ("", "adapters", recipe.name)], out, progress)


def _base_stage(out: Path, progress: Progress) -> None:
    directory = out / "base"
    if (directory / "model.safetensors").exists():
        return
    if not (directory / "tokenizer.json").exists():
        train_tokenizer(directory)
    torch.set_num_threads(NUM_BASE_THREADS)
    checkpoint = out / "checkpoints" / "base.pt"
    report = _reporter("base", SCHEDULE.num_steps, progress)
    train_base(load_tokenizer(directory), directory, checkpoint, report)
    checkpoint.unlink(missing_ok=True)


def _adapter_stages(recipes: list[Recipe], out: Path, progress: Progress) -> None:
    """Train what is missing, each adapter in a process of its own."""
    missing = [recipe for recipe in recipes if not (_directory(recipe, out) / "adapter_model.safetensors").exists()]
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(NUM_ADAPTERS_AT_ONCE, context) as pool:
        steps: Queue[tuple[str, int, float]] = manager.Queue()
        training = [pool.submit(_train_adapter, RECIPES.index(recipe), out, steps) for recipe in missing]
        reports = {recipe.name: _reporter(recipe.name, recipe.schedule.num_steps, progress) for recipe in missing}
        while not (all(stage.done() for stage in training) and steps.empty()):
            with suppress(Empty):
                name, step, loss = steps.get(timeout=0.2)
                reports[name](step, loss)
        for stage in training:
            stage.result()


def _train_adapter(number: int, out: Path, steps: "Queue[tuple[str, int, float]]") -> None:
    """One adapter from its first or last checkpoint to its files; runs in a process of its own."""
    recipe = RECIPES[number]
    torch.set_num_threads(NUM_ADAPTER_THREADS)
    checkpoint = out / "checkpoints" / f"{recipe.name}.pt"
    train_adapter(
        recipe,
        out / "base",
        _directory(recipe, out),
        checkpoint,
        lambda step, loss: steps.put((recipe.name, step, loss)),
    )
    checkpoint.unlink(missing_ok=True)


def _directory(recipe: Recipe, out: Path) -> Path:
    return out / recipe.folder / recipe.name


def _reporter(description: str, num_steps: int, progress: Progress) -> Callable[[int, float], None]:
    task = progress.add_task(description, total=num_steps, loss=float("nan"))
    return lambda step, loss: progress.update(task, completed=step + 1, loss=loss)


if __name__ == "__main__":
    typer.run(main)
