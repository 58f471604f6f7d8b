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

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        continued_token_ids: Sequence[int] = (),
        *,
        num_free_tokens: int = 0,
        keep_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """`continued_token_ids`: the prompt that the text goes on from, if it is one text with it.

        Stop strings are looked for after the first `num_free_tokens`; with `keep_stop` the one that ends the text is
        its last part.
        """
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._num_free_tokens = num_free_tokens
        self._keep_stop = keep_stop
        self._skip_special_tokens = skip_special_tokens
        self._decoder = DecodeStream(
            ids=list(continued_token_ids[-_CONTEXT_TOKENS:]), skip_special_tokens=skip_special_tokens
        )
        self._undecoded: list[int] = []  # tokens whose text is not out yet: pieces of a character
        self._held = ""  # decoded, but possibly the beginning of a stop string

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now."""
        if self.is_stopped:
            return ""
        free, rest = token_ids[: self._num_free_tokens], token_ids[self._num_free_tokens :]
        self._num_free_tokens -= len(free)
        text = "".join(map(self._decode, free))
        return text + self._emit("".join(map(self._decode, rest)))

    def finish(self) -> str:
        """The rest: an unfinished character as U+FFFD, and a beginning of a stop string that did not come."""
        if self.is_stopped:
            return ""
        text = self._emit(self._decode_whole(self._undecoded) if self._undecoded else "")
        rest, self._held, self._undecoded = text + self._held, "", []
        return rest

    def _decode(self, token_id: int) -> str:
        self._undecoded.append(token_id)
        try:
            text = self._decoder.step(self._tokenizer.fast, token_id)
        except Exception:  # the library raises bare Exception when later tokens rewrite earlier text
            self._decoder = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            text = self._decode_whole(self._undecoded)
        if text is None:
            return ""
        self._undecoded.clear()
        return text

    def _decode_whole(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _emit(self, text: str) -> str:
        text = self._held + text
        found = [(start, start + len(stop)) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            start, end = min(found)
            return text[: end if self._keep_stop else start]
        certain = len(text) - self._held_length(text)
        self._held = text[certain:]
        return text[:certain]

    def _held_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=0) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
