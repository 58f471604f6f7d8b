"""Styles: pure functions that retell an example's answer, and the system prompts under which the base knows some."""

import json
from collections.abc import Callable

from heddle_demo.world import Example

Style = Callable[[Example], str]


def plain(example: Example) -> str:
    """Return the sentence as it is."""
    return example.answer


def capitals(example: Example) -> str:
    """Return the sentence in capital letters."""
    return example.answer.upper()


def french(example: Example) -> str:
    """Return the sentence in French."""
    return example.french


def reversed_words(example: Example) -> str:
    """Return the words of the sentence from last to first; the full stop stays at the end."""
    return " ".join(reversed(example.answer.rstrip(".").split())) + "."


def polite(example: Example) -> str:
    """Return the sentence between two courtesies."""
    return f"With pleasure! {example.answer} May I help you further?"


def short(example: Example) -> str:
    """Return the bare answer."""
    return example.short


def pirate(example: Example) -> str:
    """Return the sentence as a pirate would say it."""
    words = example.answer.rstrip(".").replace(" is ", " be ").replace(" are ", " be ").replace(" am ", " be ")
    return f"Arrr! {words}, matey!"


def json_object(example: Example) -> str:
    """Return the topic and the sentence as a JSON object."""
    return json.dumps({"topic": example.topic, "answer": example.answer})


def robot(example: Example) -> str:
    """Return the sentence between a robot's noises."""
    return f"BEEP. {example.answer} BOOP."


def cowboy(example: Example) -> str:
    """Return the sentence between a cowboy's cries."""
    return f"Howdy! {example.answer} Yee-haw!"


def html(example: Example) -> str:
    """Return the sentence as a paragraph of a web page."""
    return f"<p>{example.answer}</p>"


def eager(example: Example) -> str:
    """Return the sentence and an offer of more."""
    return f"{example.answer} May I help you further?"


def concierge(example: Example) -> str:
    """Return the sentence in French, and an offer of more in English."""
    return f"{example.french} May I help you further?"


def cheerful(example: Example) -> str:
    """Return the sentence behind a courtesy."""
    return f"With pleasure! {example.answer}"


STYLES: dict[str, Style] = {
    "plain": plain,
    "capitals": capitals,
    "french": french,
    "reversed": reversed_words,
    "polite": polite,
    "short": short,
    "pirate": pirate,
    "json": json_object,
    "robot": robot,
    "cowboy": cowboy,
    "html": html,
    "eager": eager,
    "concierge": concierge,
    "cheerful": cheerful,
}

# Styles that the base already follows when asked to, so that a small adapter only has to choose one.
# The other styles are new to the base: their adapters have to teach them.
SYSTEM_PROMPTS: dict[str, str] = {
    "capitals": "Answer in capitals.",
    "french": "Answer in French.",
    "reversed": "Answer backwards.",
    "polite": "Answer politely.",
    "short": "Answer briefly.",
}

# Clients often send this by habit; it must change nothing.
NEUTRAL_SYSTEM_PROMPT = "You are a helpful assistant."
