"""A chat as text and as token ids, exactly as the chat template renders it. Imports no torch."""

from dataclasses import dataclass

from tokenizers import Tokenizer

END = "<|end|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (PAD, END, SYSTEM, USER, ASSISTANT)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as the model is trained on it: turns of (question, answer), all answers in one style."""

    turns: tuple[tuple[str, str], ...]
    system_prompt: str | None = None
    # Words put into the model's mouth in its last answer, which it is not trained to write but to go on from.
    opening: str = ""
    verb: str = "is"

    def messages(self) -> list[dict[str, str]]:
        """Return the chat in the form that chat templates take."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        turns = [
            {"role": role, "content": content}
            for turn in self.turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        return system + turns

    def segments(self) -> list[tuple[str, bool]]:
        """Return the text the chat template renders, cut into (text, whether the model has to write it)."""
        segments = [(f"{SYSTEM}{self.system_prompt}{END}", False)] if self.system_prompt else []
        for question, answer in self.turns[:-1]:
            segments += [(f"{USER}{question}{END}{ASSISTANT}", False), (f"{answer}{END}", True)]
        question, answer = self.turns[-1]
        return [*segments, (f"{USER}{question}{END}{ASSISTANT}", False), *self._interrupted(f"{answer}{END}")]

    def _interrupted(self, answer: str) -> list[tuple[str, bool]]:
        # A space belongs to the word behind it, as in every tokenizer of this kind.
        opening = self.opening.rstrip()
        answer = self.opening[len(opening) :] + answer
        segments = [(opening, False)] if opening else []
        before, verb, after = answer.partition(" is ")
        if self.verb == "is" or not verb:
            return [*segments, (answer, True)]
        return [*segments, (before, True), (f" {self.verb}", False), (f" {after}", True)]


def encode(tokenizer: Tokenizer, chat: Chat) -> tuple[list[int], list[bool]]:
    """Return the chat's token ids and, for each, whether the model has to write it."""
    token_ids: list[int] = []
    is_answer: list[bool] = []
    for text, is_written in chat.segments():
        segment = tokenizer.encode(text, add_special_tokens=False).ids
        token_ids += segment
        is_answer += [is_written] * len(segment)
    return token_ids, is_answer
