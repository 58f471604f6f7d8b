"""What a response consists of, item by item: reasoning, messages, function calls; and the events that tell of them.

OpenAI's order: an item is added, its part is added, text comes; then text, part and item are done. The events have no
numbers here (`responses_reply` counts them).
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from heddle_server.api.answer_reader import CalledTool
from heddle_server.api.generation import Delta
from heddle_server.api.replies import TokenPairs, logprob_entries, tokens_of
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.messages import TokenLogprobs

Json = dict[str, Any]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class Output:
    """The items of one response, as far as they have come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._done: list[Json] = []
        self._open: _TextItem | None = None
        # Tokens that have come since there was last something to tell; none where nobody wants their logprobs.
        self._untold: list[tuple[int, TokenLogprobs]] = []

    @property
    def items(self) -> list[Json]:
        """All of them; one that is still open counts as it is."""
        return self._done if self._open is None else [*self._done, self._open.whole("incomplete")]

    def take(self, delta: Delta) -> Iterator[Json]:
        """The events of one more delta."""
        self._untold += tokens_of(delta)
        parts = delta.parts
        if parts.reasoning:
            yield from self._tell(_ReasoningItem, parts.reasoning, [])
        if parts.content:
            yield from self._tell(_MessageItem, parts.content, self._tokens_of(parts.content))
        for call in parts.tool_calls:
            yield from self._close("completed")
            yield from self._call(call)
        if parts:
            self._untold = []

    def finish(self, *, is_complete: bool) -> Iterator[Json]:
        """The events of the end. An answer that said nothing is an empty message."""
        if not self.items:
            yield from self._tell(_MessageItem, "", [])
        yield from self._close("completed" if is_complete else "incomplete")

    def _tokens_of(self, text: str) -> TokenPairs:
        """Of the tokens that are untold those that the text is made of: marks before it are none of it."""
        pieces = [self._tokenizer.token_bytes(token_id) for token_id, _ in self._untold]
        start = max(b"".join(pieces).rfind(text.encode()), 0)
        ends = itertools.accumulate(map(len, pieces))
        return [pair for pair, end in zip(self._untold, ends, strict=True) if end > start]

    def _tell(self, kind: type[_TextItem], text: str, tokens: TokenPairs) -> Iterator[Json]:
        if not isinstance(self._open, kind):
            yield from self._close("completed")
            self._open = kind(len(self._done))
            yield from self._open.opening()
        yield self._open.more(text, logprob_entries(self._tokenizer, tokens))

    def _close(self, status: ItemStatus) -> Iterator[Json]:
        if self._open is not None:
            yield from self._open.closing(status)
            self._done.append(self._open.whole(status))
            self._open = None

    def _call(self, call: CalledTool) -> Iterator[Json]:
        """A call comes whole: it is understood only when it is."""
        index = len(self._done)
        item = {
            "id": _new_id("fc"),
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield {"type": "response.output_item.added", "output_index": index, "item": begun}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments}
        yield {
            "type": "response.function_call_arguments.done",
            **place,
            "name": call.name,
            "arguments": call.arguments,
        }
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
        self._done.append(item)


class _TextItem:
    """An item of one part of text, while that comes."""

    id_prefix: str
    event_name: str  # of its text

    def __init__(self, index: int) -> None:
        """`index`: its place in the output."""
        self._id = _new_id(self.id_prefix)
        self._index = index
        self._texts: list[str] = []
        self._logprobs: list[Json] = []

    def whole(self, status: ItemStatus) -> Json:
        """The item as it is now."""
        return self._item(status, [self._part("".join(self._texts), self._logprobs)])

    def opening(self) -> Iterator[Json]:
        yield {"type": "response.output_item.added", "output_index": self._index, "item": self._item("in_progress", [])}
        yield {"type": "response.content_part.added", **self._place, "part": self._part("", [])}

    def more(self, text: str, logprobs: list[Json]) -> Json:
        """One more piece of the text; none of it is told twice."""
        self._texts.append(text)
        self._logprobs += logprobs
        return {"type": f"{self.event_name}.delta", **self._place, "delta": text, **self._beside_text(logprobs)}

    def closing(self, status: ItemStatus) -> Iterator[Json]:
        text = "".join(self._texts)
        yield {"type": f"{self.event_name}.done", **self._place, "text": text, **self._beside_text(self._logprobs)}
        yield {"type": "response.content_part.done", **self._place, "part": self._part(text, self._logprobs)}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.whole(status)}

    @property
    def _place(self) -> Json:
        return {"item_id": self._id, "output_index": self._index, "content_index": 0}

    def _item(self, status: ItemStatus, content: list[Json]) -> Json:
        raise NotImplementedError

    def _part(self, text: str, logprobs: list[Json]) -> Json:
        raise NotImplementedError

    def _beside_text(self, logprobs: list[Json]) -> Json:
        raise NotImplementedError


class _MessageItem(_TextItem):
    id_prefix = "msg"
    event_name = "response.output_text"

    def _item(self, status: ItemStatus, content: list[Json]) -> Json:
        return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, text: str, logprobs: list[Json]) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _beside_text(self, logprobs: list[Json]) -> Json:
        return {"logprobs": logprobs}


class _ReasoningItem(_TextItem):
    id_prefix = "rs"
    event_name = "response.reasoning_text"

    def _item(self, status: ItemStatus, content: list[Json]) -> Json:
        return {"id": self._id, "type": "reasoning", "status": status, "summary": [], "content": content}

    def _part(self, text: str, logprobs: list[Json]) -> Json:
        return {"type": "reasoning_text", "text": text}

    def _beside_text(self, logprobs: list[Json]) -> Json:
        return {}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
