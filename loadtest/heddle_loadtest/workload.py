"""What is asked, of which adapter: a pure function of prompts, adapters and a seed. Knows no time and no HTTP.

Requests are numbered. Adapters take turns, and every adapter gets the same prompts in the same order, so that
differences between adapters are theirs and not their prompts'.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heddle_loadtest.errors import SpecError

BUILTIN_PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a loom.",
    "Name three uses for a paper clip and say which one is best.",
    "Summarise the story of Robinson Crusoe in one paragraph.",
    "What should I check before I buy a used bicycle?",
    "Translate 'good morning, how did you sleep?' into French and Spanish.",
    "Describe how a refrigerator works to a ten-year-old.",
    "Write a polite e-mail that moves a meeting from Tuesday to Thursday.",
    "Give me a simple recipe with rice, eggs and spinach.",
    "What is the difference between weather and climate?",
    "Write a Python function that reverses the words of a sentence.",
    "List five questions to ask in a job interview.",
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to make."""

    adapter: str
    prompt: str
    seed: int  # for the server's sampling


class Workload:
    """The numbered requests of a run, the same for the same arguments."""

    def __init__(self, adapters: Sequence[str], prompts: Sequence[str], seed: int) -> None:
        self._adapters = tuple(adapters)
        self._prompts = random.Random(seed).sample(prompts, k=len(prompts))
        self._seed = seed

    def ask(self, index: int) -> Ask:
        """Request number `index`, from 0, without end."""
        turn, adapter_index = divmod(index, len(self._adapters))
        prompt = self._prompts[turn % len(self._prompts)]
        return Ask(self._adapters[adapter_index], prompt, self._seed + index)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, one a line, blank lines skipped. Raises SpecError if there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else "is not UTF-8 text"
        raise SpecError("prompts_file", path, problem, "Name a text file with one prompt a line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SpecError("prompts_file", path, "holds no prompt", "Write one prompt a line")
    return prompts
