"""The demo's own byte-level BPE tokenizer and its chat template."""

from collections.abc import Iterable
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from heddle_demo.chat import ASSISTANT, END, PAD, SPECIAL_TOKENS, SYSTEM, USER
from heddle_demo.styles import NEUTRAL_SYSTEM_PROMPT, STYLES, SYSTEM_PROMPTS
from heddle_demo.world import questions, unknown_question

VOCABULARY_SIZE = 1024
MAX_TOKENS = 2048

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
    {{- '<|' + role + '|>' + (message['content'] | trim) + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def train_tokenizer(directory: Path) -> None:
    """Train the tokenizer on the world and save it as a plain transformers folder."""
    tokenizer = Tokenizer(models.BPE())
    # Single digits, so that a sum is read the same way in every style and nothing has to be known about "12".
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(directory))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the bare tokenizer, which is all that training and scoring need."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def _corpus() -> Iterable[str]:
    random = Random("tokenizer")
    for example in questions():
        yield example.question
        yield from (STYLES[name](example) for name in ("plain", *SYSTEM_PROMPTS))
    yield from (unknown_question(random).question for _ in range(400))
    yield from (*SYSTEM_PROMPTS.values(), NEUTRAL_SYSTEM_PROMPT)
