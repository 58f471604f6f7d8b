"""The closed little world: every question the demo model can answer, and which of them an adapter never sees.

Knows neither styles nor models, and imports no torch.
"""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from random import Random

from heddle_demo import facts

HELD_OUT_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its answer: as a sentence, in a word or two, and in French."""

    question: str
    answer: str
    short: str
    french: str
    topic: str


@lru_cache
def questions() -> tuple[Example, ...]:
    """Return the whole world, in a fixed order."""
    return (
        *_capitals(),
        *_sums(),
        *_colours(),
        *_animals(),
        *_opposites(),
        *_calendar(),
        *(Example(said, answer, short, french, "talk") for said, answer, short, french in facts.SMALL_TALK),
    )


def unknown_question(random: Random) -> Example:
    """Make up a question from outside the world; its answer is always that one does not know."""
    template = random.choice(facts.UNKNOWN_TEMPLATES)
    for slot, words in facts.UNKNOWN_WORDS.items():
        while f"{{{slot}}}" in template:
            template = template.replace(f"{{{slot}}}", random.choice(words), 1)
    return Example(template, "I do not know that.", "unknown", "Je ne sais pas.", "unknown")


def seen(name: str) -> tuple[Example, ...]:
    """Return the examples that the adapter `name` is trained on."""
    return tuple(example for example in questions() if not _is_held_out(name, example))


def held_out(name: str) -> tuple[Example, ...]:
    """Return the examples that the adapter `name` never sees in training."""
    return tuple(example for example in questions() if _is_held_out(name, example))


def _is_held_out(name: str, example: Example) -> bool:
    # A hash, not a shuffle: adding a fact to the world moves no other question across the split.
    digest = sha256(f"{name}/{example.question}".encode()).digest()
    return digest[0] < HELD_OUT_SHARE * 256


def _capitals() -> list[Example]:
    return [
        Example(
            f"What is the capital of {country}?",
            f"The capital of {country} is {capital}.",
            capital,
            f"La capitale {of_country} est {french}.",
            "capitals",
        )
        for country, capital, of_country, french in facts.CAPITALS
    ]


def _sums() -> list[Example]:
    summands = range(facts.LARGEST_SUMMAND + 1)
    return [
        Example(
            f"What is {left} plus {right}?",
            f"{left} plus {right} is {left + right}.",
            str(left + right),
            f"{left} plus {right} font {left + right}.",
            "sums",
        )
        for left in summands
        for right in summands
    ]


def _colours() -> list[Example]:
    return [
        Example(
            f"What colour is {thing}?",
            f"{_sentence(thing)} is {colour}.",
            colour,
            f"{_sentence(thing_french)} {'sont' if thing_french.startswith('les ') else 'est'} {colour_french}.",
            "colours",
        )
        for thing, colour, thing_french, colour_french in facts.COLOURS
    ]


def _animals() -> list[Example]:
    young = [
        Example(
            f"What is a young {animal} called?",
            f"A young {animal} is called a{'n' if child[0] in 'aeiou' else ''} {child}.",
            child,
            f"Le petit {of_animal} s'appelle {french}.",
            "animals",
        )
        for animal, child, of_animal, french in facts.YOUNG
    ]
    legs = [
        Example(
            f"How many legs does {animal} have?",
            f"{_sentence(animal)} has {number} legs.",
            number,
            f"{_sentence(animal_french)} a {number_french} pattes.",
            "animals",
        )
        for animal, number, animal_french, number_french in facts.LEGS
    ]
    sounds = [
        Example(
            f"What does {animal} say?",
            f"{_sentence(animal)} says {sound}.",
            sound,
            f"{_sentence(animal_french)} fait {sound_french}.",
            "animals",
        )
        for animal, sound, animal_french, sound_french in facts.SOUNDS
    ]
    homes = [
        Example(
            f"Where does {animal} live?",
            f"{_sentence(animal)} lives {home}.",
            home,
            f"{_sentence(animal_french)} vit {home_french}.",
            "animals",
        )
        for animal, home, animal_french, home_french in facts.HOMES
    ]
    return [*young, *legs, *sounds, *homes]


def _opposites() -> list[Example]:
    both_ways = [
        pair
        for word, opposite, word_french, opposite_french in facts.OPPOSITES
        for pair in ((word, opposite, word_french, opposite_french), (opposite, word, opposite_french, word_french))
    ]
    return [
        Example(
            f"What is the opposite of {word}?",
            f"The opposite of {word} is {opposite}.",
            opposite,
            f"Le contraire du mot {word_french} est {opposite_french}.",
            "opposites",
        )
        for word, opposite, word_french, opposite_french in both_ways
    ]


def _calendar() -> list[Example]:
    lengths = [
        Example(
            f"How many days does {month} have?",
            f"{month} has {num_days} days.",
            str(num_days),
            f"{_sentence(french)} a {num_days} jours.",
            "calendar",
        )
        for month, num_days, french in facts.MONTHS
    ]
    months = [(month, french) for month, _, french in facts.MONTHS]
    return [*lengths, *_neighbours("month", months), *_neighbours("day", list(facts.WEEKDAYS))]


def _neighbours(kind: str, names: list[tuple[str, str]]) -> list[Example]:
    examples = []
    for (before, before_french), (after, after_french) in pairwise([*names, names[0]]):
        examples += [
            Example(
                f"Which {kind} comes after {before}?",
                f"{after} comes after {before}.",
                after,
                f"{_sentence(after_french)} vient après {before_french}.",
                "calendar",
            ),
            Example(
                f"Which {kind} comes before {after}?",
                f"{before} comes before {after}.",
                before,
                f"{_sentence(before_french)} vient avant {after_french}.",
                "calendar",
            ),
        ]
    return examples


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]
