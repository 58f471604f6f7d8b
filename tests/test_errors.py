"""Every typed error has its row, and the envelope is always whole."""

from __future__ import annotations

import json

import pytest

import heddle_adapters.errors
from heddle_adapters.errors import AdapterError, AdapterNotFound, StoreUnusable
from heddle_server.api import errors
from heddle_server.api.errors import KINDS, ApiError, engine_error, error_response, http_error_response, kind_of


def subclasses(cls: type[Exception]) -> set[type[Exception]]:
    return {cls}.union(*(subclasses(each) for each in cls.__subclasses__()))


@pytest.mark.parametrize("cls", sorted(subclasses(ApiError) - {ApiError} | subclasses(AdapterError), key=str))
def test_every_typed_error_has_a_row_of_its_own(cls: type[Exception]) -> None:
    if cls.__module__ in (errors.__name__, heddle_adapters.errors.__name__):
        assert cls in KINDS


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: str(kind.code))
def test_types_follow_the_status(kind: errors.ErrorKind) -> None:
    expected = "rate_limit_error" if kind.status == 429 else "invalid_request_error"
    assert kind.type == ("server_error" if kind.status >= 500 else expected)


def test_envelope_of_a_typed_error() -> None:
    response = error_response(AdapterNotFound("There is no adapter 'sqll'. Did you mean sql?"))
    assert response.status_code == 404
    assert json.loads(bytes(response.body)) == {
        "error": {
            "message": "There is no adapter 'sqll'. Did you mean sql?",
            "type": "invalid_request_error",
            "param": "adapter",
            "code": "adapter_not_found",
        }
    }


def test_an_unforeseen_error_tells_nothing_of_its_insides() -> None:
    response = error_response(RuntimeError("/secret/path"))
    assert response.status_code == 500
    assert b"secret" not in bytes(response.body)
    assert json.loads(bytes(response.body))["error"]["code"] == "internal_error"


def test_a_message_that_is_not_unicode_still_encodes() -> None:
    assert json.loads(bytes(error_response(errors.InvalidRequest("\ud800")).body))["error"]["message"] == "\ud800"


def test_unavailable_says_when_to_come_back() -> None:
    assert error_response(errors.EngineUnavailable("loading")).headers["retry-after"] == "2"
    assert error_response(errors.Overloaded("full", retry_after_seconds=7)).headers["retry-after"] == "7"
    assert error_response(errors.TenantOverloaded("your share")).headers["retry-after"] == "2"
    assert error_response(StoreUnusable("in use")).headers["retry-after"] == "2"
    assert "retry-after" not in error_response(errors.InvalidRequest("no")).headers


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("engine_died", 503),
        ("adapter_damaged", 422),
        ("adapter_load_failed", 422),
        ("adapter_too_large", 413),
        ("adapter_capacity", 503),
        ("store_unusable", 503),
        ("internal_error", 500),
        (None, 500),
    ],
)
def test_errors_of_the_engine(code: str | None, status: int) -> None:
    assert kind_of(engine_error(code, "what happened")).status == status


def test_the_codes_that_clients_tell_apart() -> None:
    codes = {kind.code: kind.status for kind in KINDS.values()}
    expected = {
        "adapter_not_found": 404,
        "adapters_not_additive": 400,
        "adapter_conflict": 400,
        "adapter_damaged": 422,
        "adapter_too_large": 413,
        "adapter_capacity": 503,
        "pin_capacity": 409,
        "overloaded": 503,
        "tenant_overloaded": 429,
    }
    assert expected.items() <= codes.items()


def test_refusals_of_the_framework() -> None:
    assert json.loads(bytes(http_error_response(404, "Nothing.").body))["error"]["code"] == "unknown_route"
