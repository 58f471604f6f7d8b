"""Answers that follow a grammar: on the demo's base, in one batch with free ones, overlapping, put back, refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import jsonschema_rs
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from engine_driver import Answer, make_request, run
from heddle_demo.data import BASE_DIR
from heddle_server.api.answer_format import answer_format
from heddle_server.api.response_format import schema_grammar
from heddle_server.api.tools import FunctionTool
from heddle_server.config import EngineConfig
from heddle_server.engine.engine import Engine
from heddle_server.grammar_compiler import GrammarCompiler, GrammarRefused
from heddle_server.request import Request
from random_schemas import random_schema
from test_answer_reader import HERMES, LLAMA3, MISTRAL, PHI4, THINKING, WEATHER

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
DIGITS = json.dumps({"grammars": [{"lark_grammar": "start: /[0-9]{3}-[0-9]{4}/"}]})


MakeEngine = Callable[..., Engine]  # with settings beside the usual ones


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def make_engine(tmp_path_factory: pytest.TempPathFactory) -> MakeEngine:
    store_path = str(tmp_path_factory.mktemp("store"))

    def make(**config: Any) -> Engine:
        options = {"max_model_len": 256, **config}
        return Engine(
            EngineConfig(model_path=str(BASE_DIR), model_name="demo", store_path=store_path, device="cpu", **options)
        )

    return make


@pytest.fixture(scope="module")
def engine(make_engine: MakeEngine) -> Iterator[Engine]:
    made = make_engine()
    yield made
    made.close()


def asking(tokenizer: Tokenizer, grammar: str | None, seed: int = 0, **sampling: object) -> Request:
    prompt = tokenizer.encode("What is the capital of France?").ids
    options = {"temperature": 1.0, "ignore_eos": False, "max_tokens": 100, **sampling}
    return make_request(prompt, seed=seed, grammar=grammar, **options)  # type: ignore[arg-type]


def text_of(tokenizer: Tokenizer, answer: Answer) -> str:
    return str(tokenizer.decode(answer.token_ids, skip_special_tokens=True))


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_each_answer_follows_its_own_grammar_and_free_ones_none(
    tokenizer: Tokenizer, overlap: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(overlap=overlap)
    grammars = [schema_grammar(PERSON), None, DIGITS] * 4
    answers = run(engine, [asking(tokenizer, grammar, seed) for seed, grammar in enumerate(grammars)])
    for grammar, answer in zip(grammars, answers, strict=True):
        text = text_of(tokenizer, answer)
        if grammar == DIGITS:
            assert re.fullmatch("[0-9]{3}-[0-9]{4}", text), text
            assert answer.finish_reason == "stop"
        elif grammar is not None:
            person = json.loads(text)
            assert isinstance(person["name"], str), text
            assert 0 <= person["age"] <= 150, text
            assert answer.finish_reason == "stop"
    free = [answer for grammar, answer in zip(grammars, answers, strict=True) if grammar is None]
    alone = run(engine, [asking(tokenizer, None, seed) for seed, grammar in enumerate(grammars) if grammar is None])
    assert [answer.token_ids for answer in free] == [answer.token_ids for answer in alone]
    engine.close()


def test_the_same_in_any_batch(tokenizer: Tokenizer, engine: Engine) -> None:
    requests = [asking(tokenizer, schema_grammar(PERSON), seed) for seed in range(6)]
    together = [answer.token_ids for answer in run(engine, requests)]
    alone = [
        run(engine, [asking(tokenizer, schema_grammar(PERSON), seed)])[0].token_ids for seed in range(len(requests))
    ]
    assert together == alone


def test_who_is_put_back_goes_on_where_it_was(tokenizer: Tokenizer, make_engine: MakeEngine) -> None:
    page_bytes = make_engine().model.page_bytes
    engine = make_engine(pool_bytes=12 * page_bytes, max_model_len=128)
    answers = run(engine, [asking(tokenizer, schema_grammar(PERSON), seed) for seed in range(12)])
    assert engine.stats().num_preemptions > 0
    assert all(json.loads(text_of(tokenizer, answer)) for answer in answers)
    engine.close()


def test_a_least_length_gives_way_to_a_grammar_that_is_over(tokenizer: Tokenizer, engine: Engine) -> None:
    (answer,) = run(engine, [asking(tokenizer, DIGITS, min_tokens=50)])
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", text_of(tokenizer, answer))
    assert answer.finish_reason == "stop"


def test_an_answer_whose_grammar_is_over_ends_even_if_ends_are_ignored(tokenizer: Tokenizer, engine: Engine) -> None:
    (answer,) = run(engine, [asking(tokenizer, DIGITS, ignore_eos=True)])
    assert answer.finish_reason == "stop"
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", text_of(tokenizer, answer))


def test_a_broken_grammar_fails_its_own_request_only(tokenizer: Tokenizer, engine: Engine) -> None:
    broken = json.dumps({"grammars": [{"lark_grammar": "start: missing"}]})
    failed, fine = run(engine, [asking(tokenizer, broken), asking(tokenizer, DIGITS)])
    assert failed.error_code == "grammar_failed"
    assert "missing" in (failed.error_message or "")
    assert fine.finish_reason == "stop"


def test_a_request_that_is_gone_before_its_grammar_is_compiled_leaves_nothing(
    tokenizer: Tokenizer, engine: Engine
) -> None:
    request = asking(tokenizer, schema_grammar({"type": "array", "items": PERSON, "maxItems": 7}))
    engine.add(request)
    engine.abort(request.request_id)
    assert not engine.has_requests
    engine.step()
    engine.check_integrity()


def test_two_hundred_random_schemas_at_full_temperature(tokenizer: Tokenizer, make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=1024)
    schemas = [random_schema(Random(seed)) for seed in range(200)]
    requests = [asking(tokenizer, schema_grammar(schema), seed, max_tokens=800) for seed, schema in enumerate(schemas)]
    answers = run(engine, requests)
    engine.close()
    stopped = [
        (schema, answer) for schema, answer in zip(schemas, answers, strict=True) if answer.finish_reason == "stop"
    ]
    for schema, answer in stopped:
        text = text_of(tokenizer, answer)
        jsonschema_rs.validator_for(schema, validate_formats=True).validate(json.loads(text))
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    assert len(stopped) >= 0.95 * len(answers)


def test_a_tokenizer_that_nobody_can_hold_to_a_grammar(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(path))
    for asked in (path, tmp_path / "missing.json"):
        with pytest.raises(GrammarRefused, match="this base's tokenizer cannot be held to a grammar"):
            GrammarCompiler(asked, 2, [1]).compile(DIGITS)


SLOW = json.dumps(
    {"grammars": [{"lark_grammar": "start: s s s s s s s s\ns: s s | s s s | /[a-z]/ | /[a-z][a-z]/ | /[a-z ]{3}/ |"}]}
)


def test_a_grammar_that_is_slow_at_every_token_ends_with_an_error(tokenizer: Tokenizer, engine: Engine) -> None:
    GrammarCompiler(BASE_DIR / "tokenizer.json", 1024, [3]).compile(SLOW)  # which tells nothing of what is to come
    hostile = [asking(tokenizer, SLOW, seed, max_tokens=200) for seed in range(4)]
    for request in (*hostile, asking(tokenizer, None, ignore_eos=True, max_tokens=100)):
        engine.add(request)
    longest_seconds, errors = 0.0, list[str | None]()
    while engine.has_requests:
        started = time.monotonic()
        errors += [output.error_code for output in engine.step() if output.finish_reason == "error"]
        longest_seconds = max(longest_seconds, time.monotonic() - started)
    assert errors, "each has ended by itself"
    assert set(errors) == {"grammar_failed"}
    assert longest_seconds < 1.0, "140 to 330 ms for each of them at every token, without a limit"


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("marks_are_special", [True, False])
@pytest.mark.parametrize("chat_template", [HERMES, THINKING, LLAMA3, MISTRAL, PHI4])
def test_forced_calls_of_every_family_can_be_compiled(
    chat_template: str, marks_are_special: bool, is_parallel: bool, is_open: bool
) -> None:
    special = {"<tool_call>": 5, "</think>": 6, "[TOOL_CALLS]": 7} if marks_are_special else {}
    found = answer_format({}, chat_template, special)
    assert found is not None
    tools = [FunctionTool.model_validate(WEATHER)]
    grammar = found.after_reasoning(found.call_grammar(tools, is_parallel=is_parallel), is_open=is_open)
    assert GrammarCompiler(BASE_DIR / "tokenizer.json", 1024, [3]).compile(grammar)


def test_a_call_may_be_forced_after_reasoning(tokenizer: Tokenizer) -> None:
    found = answer_format({}, THINKING, {})
    assert found is not None
    tools = [FunctionTool.model_validate(WEATHER)]
    grammar = found.after_reasoning(found.call_grammar(tools, is_parallel=False), is_open=True)
    matcher = GrammarCompiler(BASE_DIR / "tokenizer.json", 1024, [3]).compile(grammar)
    answer = 'Hm.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    token_ids = tokenizer.encode(answer, add_special_tokens=False).ids
    assert matcher.consume_tokens(token_ids)
    assert matcher.is_accepting()


def test_properties_that_nobody_named_are_not_made_up(tokenizer: Tokenizer, engine: Engine) -> None:
    nested = {"type": "object", "properties": {"b": {"enum": [1, 2]}}, "required": ["b"]}
    schemas = [
        {"type": "object", "properties": {"a": nested}, "required": ["a"]},
        {"$defs": {"n": nested}, "type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"]},
    ]
    for answer in run(
        engine, [asking(tokenizer, schema_grammar(schema), seed) for seed in range(4) for schema in schemas]
    ):
        assert answer.finish_reason == "stop"
        assert json.loads(text_of(tokenizer, answer)) in ({"a": {"b": 1}}, {"a": {"b": 2}})


def test_a_schema_that_says_more_of_its_properties_keeps_its_meaning() -> None:
    both = {"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}], "required": ["a", "b"]}
    for schema in (both, {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": {"const": 2}}):
        matcher = GrammarCompiler(BASE_DIR / "tokenizer.json", 1024, [3]).compile(schema_grammar(schema))
        token_ids = Tokenizer.from_file(str(BASE_DIR / "tokenizer.json")).encode('{"a": 1, "b": 2}').ids
        assert matcher.consume_tokens(token_ids), matcher.get_error()
