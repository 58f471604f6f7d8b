"""What is asked: questions, random words, random token ids. Knows no schedule and no lengths but those it is told."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from heddle_loadtest.errors import SpecError

if TYPE_CHECKING:
    from numpy.random import Generator

NUM_BLOCK_TOKENS = 512  # of one hash id, as in Mooncake's traces

BUILTIN_QUESTIONS = (
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

# Each is one token, with the space before it, of the vocabularies of GPT-2, cl100k, o200k and Llama 2 (checked there).
_WORD_LIST = """
about above across act add after again age ago air all almost along also always among and animal answer any area
arm around art ask away back bad bank base be bed before behind best better between big bit black blood blue board
boat body book both box boy bring brother brown build but buy by call can car care carry case catch cause center
chance change check child choose church city clean clear close cold color come common cost could country course
cover cross cut dark daughter day dead deal deep develop die different door down draw dream drive drop dry during
each early earth east easy eat edge eight either else end enough even evening ever every example eye face fact
fall family far fast father fear feel few field fight fill final find fine fire first fish five floor follow food
foot for force form four free friend from front full future game garden gave get girl give glass go gold good
government great green ground group grow had half hand happen happy hard have he head hear heart heat heavy help
her here high him his hold home hope horse hot hour house how human hundred husband ice idea if important in into
island it job join just keep key kind king know land language large last late law lead learn leave left less let
letter level lie life light like line list little live local long look lost lot love low machine main make man
many map mark market matter may mean measure meet member men middle might mile milk mind minute miss money month
moon more morning most mother mountain mouth move much music must name nation natural near need never new next
night nine no north not note nothing now number of off office often oil old on once one only open or order other
our out over own page paper parent part party pass past pay peace people person picture piece place plan plane
plant play point poor position possible power present press price problem process public pull put question quick
quite race rain raise reach read ready real reason record red remember rest result rich right rise river road rock
role room round rule run safe said same sand save say school science sea season seat second see seem sell send
sense serve set seven several shall shape she ship short should show side sign silver simple since sing sister sit
six size skin sky sleep slow small snow so social soft some son song soon sort sound south space speak special
speed spring stand star start state station stay step still stone stop store story street strong study such summer
sun support sure surface system table take talk tax teach team tell ten test than that the their them then there
these they thing think this those though thought thousand three through time to today together too top total touch
toward town trade train travel tree trip true try turn two type under unit until up us use value very visit voice
wait walk wall want war warm was watch water wave way we week weight well west what wheel when where which while
white who whole why wide wife wild will wind window wing winter wish with woman wonder wood word work world would
write year yellow yes yet you young your
"""
WORDS = tuple(_WORD_LIST.split())


def read_questions(path: Path) -> tuple[str, ...]:
    """The questions of a UTF-8 text file, one a line, blank lines skipped. Raises SpecError if there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else "is not UTF-8 text"
        raise SpecError("questions", path, problem, "Name a text file with one question a line") from error
    questions = tuple(line.strip() for line in lines if line.strip())
    if not questions:
        raise SpecError("questions", path, "holds no question", "Write one question a line")
    return questions


def words(random: Generator, num_words: int) -> str:
    """That many common English words, about one token each, with single spaces between."""
    return " ".join(_draw_words(random, num_words))


def words_of_blocks(hash_ids: Sequence[int], num_tokens: int) -> str:
    """A prompt of `num_tokens` words in which the same hash id stands for the same 512 words, whatever the seed.

    So two requests of a trace share a prefix as long as their hash ids agree. The last block is cut, or runs on if
    there are too few ids for so many tokens. `hash_ids` must not be empty; negative ids are fine.
    """
    assert hash_ids, "a request without hash ids shares nothing: draw its prompt with `words`"
    drawn: list[str] = []
    for hash_id in hash_ids[: max(1, -(-num_tokens // NUM_BLOCK_TOKENS))]:
        drawn.extend(_block(hash_id))
    if len(drawn) < num_tokens:
        drawn.extend(_draw_words(_block_random(hash_ids[-1], part=1), num_tokens - len(drawn)))
    return " ".join(drawn[:num_tokens])


def token_ids(random: Generator, count: int, first: int, vocabulary: int) -> list[int]:
    """That many ids, each of `first` to `vocabulary` - 1 equally likely."""
    drawn: list[int] = random.integers(first, vocabulary, size=count).tolist()
    return drawn


def _draw_words(random: Generator, num_words: int) -> list[str]:
    return [WORDS[index] for index in random.integers(len(WORDS), size=num_words).tolist()]


@functools.lru_cache(maxsize=4096)  # the shared prefixes; a trace names hundreds of thousands of blocks only once
def _block(hash_id: int) -> tuple[str, ...]:
    return tuple(_draw_words(_block_random(hash_id, part=0), NUM_BLOCK_TOKENS))


def _block_random(hash_id: int, part: int) -> Generator:
    """`part` tells a block's own words from those that it runs on with."""
    from numpy.random import default_rng

    sign = int(hash_id < 0)  # a seed cannot be negative
    return default_rng((abs(hash_id), sign, part))
