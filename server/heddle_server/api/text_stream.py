"""Token ids to text increments: whole characters only, and never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from heddle_server.api.tokenizer import Tokenizer

# Tokens of prompt a continued text needs to come out with the right spacing, and then some.
_CONTEXT_TOKENS = 8


class TextStream:
    """One answer's text.

    `push` returns what became certain; `is_stopped` turns true when a stop string was completed, after which the
    text is over; `finish` returns what was held back once no more tokens come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), continued_token_ids: Sequence[int] = ()) -> None:
        """`continued_token_ids`: the prompt that the text goes on from, if it is one text with it."""
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = DecodeStream(ids=list(continued_token_ids[-_CONTEXT_TOKENS:]), skip_special_tokens=True)
        self._undecoded: list[int] = []  # tokens whose text is not out yet: pieces of a character
        self._held = ""  # decoded, but possibly the beginning of a stop string

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now."""
        if self.is_stopped:
            return ""
        return self._emit("".join(self._decode(token_id) for token_id in token_ids))

    def finish(self) -> str:
        """The rest: an unfinished character as U+FFFD, and a beginning of a stop string that did not come."""
        if self.is_stopped:
            return ""
        text = self._emit(self._tokenizer.decode(self._undecoded) if self._undecoded else "")
        rest, self._held, self._undecoded = text + self._held, "", []
        return rest

    def _decode(self, token_id: int) -> str:
        self._undecoded.append(token_id)
        try:
            text = self._decoder.step(self._tokenizer.fast, token_id)
        except Exception:  # the library raises bare Exception when later tokens rewrite earlier text
            self._decoder = DecodeStream(skip_special_tokens=True)
            text = self._tokenizer.decode(self._undecoded)
        if text is None:
            return ""
        self._undecoded.clear()
        return text

    def _emit(self, text: str) -> str:
        text = self._held + text
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.is_stopped, self._held = True, ""
            return text[: min(starts)]
        certain = len(text) - self._held_length(text)
        self._held = text[certain:]
        return text[:certain]

    def _held_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=0) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
