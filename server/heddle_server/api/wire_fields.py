"""Field types of the wire format: what is refused until it is served, and forms that are brought to one.

Validators raise pydantic errors whose type is an error class of the API (`unsupported_parameter`), which
`validation.py` turns into the typed error.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

MAX_REFERENCE_LENGTH = 272  # namespace, name and a whole digest
MAX_MIXED_ADAPTERS = 8
MAX_SCALE = 100.0
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 64


class WireModel(BaseModel):
    """Strict: "5" is no number, NaN is none either, and an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


def unsupported(what: str) -> PydanticCustomError:
    """The error for something OpenAI defines and this server does not serve yet."""
    # As a template value, so that braces in `what` stay text.
    return PydanticCustomError("unsupported_parameter", "{what} is not served yet", {"what": what})


def invalid(message: str) -> PydanticCustomError:
    """The error for a value of the wrong form."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def neutral(*values: object) -> AfterValidator:
    """A field that is not served yet: null and `values` mean "off" and pass, all else is refused."""

    def refuse_others(value: object) -> object:
        # 1 == True in Python; in JSON they are different things.
        if value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
            return value
        raise unsupported("This value")

    return AfterValidator(refuse_others)


Ignored = Annotated[object, Field(description="Accepted; changes nothing in the answer.")]


def _joined_text(content: object) -> object:
    if not isinstance(content, list):
        return content
    return "".join(_part_text(number, part) for number, part in enumerate(content))


def _part_text(number: int, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise unsupported(f"Content of type {kind[:32]!r} (part {number})")
    if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
        raise invalid(f"Content part {number} must be an object {{'type': 'text', 'text': '...'}}")
    return str(part["text"])


MessageText = Annotated[
    str,
    BeforeValidator(_joined_text),
    Field(description="A string, or a list of text parts, which are joined."),
]


def _stop_list(stop: object) -> object:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise invalid("stop must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS or not all(1 <= len(each) <= MAX_STOP_LENGTH for each in stops):
        raise invalid(f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters each")
    return stops


StopStrings = Annotated[list[str], BeforeValidator(_stop_list)]


def _one_prompt(prompt: object) -> object:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise unsupported("More than one prompt in a request")
        prompt = prompt[0]
    if isinstance(prompt, str):
        try:
            prompt.encode()  # pydantic looks for lone surrogates in plain strings only, not in a union
        except UnicodeEncodeError:
            raise invalid("prompt is not valid Unicode text") from None
        return prompt
    if isinstance(prompt, list) and all(type(each) is int and each >= 0 for each in prompt):
        return prompt
    raise invalid("prompt must be a string or a list of token ids")


Prompt = Annotated[str | list[int], BeforeValidator(_one_prompt)]


class ScaledAdapter(WireModel):
    """One adapter of a request, and how strongly it counts: 1 is the adapter as it was trained."""

    name: Annotated[str, Field(max_length=MAX_REFERENCE_LENGTH, description="A reference, as team/sql@prod.")]
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0


# What pydantic puts into an error's location for the forms below; nothing that a client wrote.
ADAPTER_FORMS = ("<reference>", "<object>", "<list>")


def _adapter_form(adapter: object) -> str | None:
    for form, kind in zip(ADAPTER_FORMS, (str, dict | ScaledAdapter, list), strict=True):
        if isinstance(adapter, kind):
            return form
    return None


def _one_of(message: str) -> Discriminator:
    return Discriminator(_adapter_form, custom_error_type="invalid_value", custom_error_message=message)


_Reference = Annotated[str, Field(max_length=MAX_REFERENCE_LENGTH), Tag(ADAPTER_FORMS[0])]
_Scaled = Annotated[ScaledAdapter, Tag(ADAPTER_FORMS[1])]
_Mixable = Annotated[
    _Reference | _Scaled, _one_of("Each adapter of a list must be a name or an object {'name': ..., 'scale': ...}")
]
_Mix = Annotated[list[_Mixable], Field(min_length=1, max_length=MAX_MIXED_ADAPTERS), Tag(ADAPTER_FORMS[2])]
AdapterField = Annotated[
    _Reference | _Scaled | _Mix,
    _one_of("adapter must be a name, an object {'name': ..., 'scale': ...} or a list of those"),
]
