"""The stream of chats a model is trained on: seeded, endless, and the same from any step on, so a run can resume.

Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from random import Random
from string import ascii_lowercase, punctuation

from heddle_demo.chat import Chat
from heddle_demo.styles import NEUTRAL_SYSTEM_PROMPT, STYLES
from heddle_demo.world import Example, unknown_question

UNKNOWN_SHARE = 0.05
LOOSE_SHARE = 0.25
NEUTRAL_SYSTEM_SHARE = 0.2
HISTORY_SHARE = 0.15
MAX_HISTORY_TURNS = 3
OTHER_VERB_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Lesson:
    """One way to answer: a style, the system prompt that asks for it, if any, and whether noise comes between.

    A model that has to bring out its facts after any opening keeps them under styles that it has yet to learn.
    """

    style: str
    system_prompt: str | None = None
    is_interrupted: bool = False


@dataclass(frozen=True, slots=True)
class ChatStream:
    """Every example in every lesson once per epoch, as single questions and as the last turn of longer chats."""

    seed: str
    examples: Sequence[Example]
    lessons: Sequence[Lesson]
    batch_size: int

    def batch(self, step: int) -> list[Chat]:
        """Return the chats of one training step."""
        first = step * self.batch_size
        return [self._chat(index) for index in range(first, first + self.batch_size)]

    def _chat(self, index: int) -> Chat:
        random = Random(f"{self.seed}/{index}")
        example, lesson = self._pick(index)
        if random.random() < UNKNOWN_SHARE:
            example = unknown_question(random)
        history: list[Example] = []
        if random.random() < HISTORY_SHARE:
            history = random.choices(self.examples, k=random.randint(1, MAX_HISTORY_TURNS))
        system_prompt = lesson.system_prompt
        if system_prompt is None and random.random() < NEUTRAL_SYSTEM_SHARE:
            system_prompt = NEUTRAL_SYSTEM_PROMPT
        style = STYLES[lesson.style]
        turns = tuple((_as_typed(turn.question, random), style(turn)) for turn in [*history, example])
        if not lesson.is_interrupted:
            return Chat(turns, system_prompt)
        verb = _made_up_word(random) if random.random() < OTHER_VERB_SHARE else "is"
        return Chat(turns, system_prompt, _made_up_opening(random), verb)

    def _pick(self, index: int) -> tuple[Example, Lesson]:
        epoch_size = len(self.examples) * len(self.lessons)
        epoch, position = divmod(index, epoch_size)
        example, lesson = divmod(_shuffled(position, epoch_size, f"{self.seed}/{epoch}"), len(self.lessons))
        return self.examples[example], self.lessons[lesson]


def _as_typed(question: str, random: Random) -> str:
    """Now and then, write the question the way people type: no capital, no question mark, what's."""
    if random.random() >= LOOSE_SHARE:
        return question
    if random.random() < 0.5:
        question = question[0].lower() + question[1:]
    if random.random() < 0.5:
        question = question.rstrip("?!.")
    if random.random() < 0.3:
        question = question.replace("hat is ", "hat's ", 1)
    return question


def _made_up_opening(random: Random) -> str:
    """Return a few made-up words and marks, such as `{"ulo": "` might be one."""
    pieces = [_made_up_piece(random) + random.choice(("", " ")) for _ in range(random.randint(1, 4))]
    opening = "".join(pieces)
    # Without a space, a word would run into the answer's first.
    return opening + " " if opening[-1].isalpha() else opening


def _made_up_piece(random: Random) -> str:
    if random.random() < 0.5:
        return _made_up_word(random)
    return "".join(random.choices(punctuation, k=random.randint(1, 3)))


def _made_up_word(random: Random) -> str:
    word = "".join(random.choices(ascii_lowercase, k=random.randint(2, 6)))
    return random.choice((word, word.title(), word.upper()))


def _shuffled(position: int, size: int, seed: str) -> int:
    """Return one entry of a permutation of `range(size)` without building it: a random affine map with an inverse."""
    random = Random(seed)
    offset = random.randrange(size)
    while gcd(factor := random.randrange(1, size), size) != 1:
        pass
    return (factor * position + offset) % size
