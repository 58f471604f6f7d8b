"""Field types of the wire format: what is refused until it is served, and forms that are brought to one.

Validators raise pydantic errors whose type is an error class of the API (`unsupported_parameter`), which
`validation.py` turns into the typed error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_REFERENCE_LENGTH = 272  # namespace, name and a whole digest
MAX_MIXED_ADAPTERS = 8
MAX_SCALE = 100.0
MAX_RANK = 1 << 20
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 64
MAX_PROMPTS = 64
MAX_BIASED_TOKENS = 300
MAX_BIAS = 100
MAX_SCHEMA_DEPTH = 64
MAX_TEMPLATE_VARIABLES = 16

_JSON_TYPES: dict[type, str] = {bool: "boolean", int: "integer", str: "string", list: "array"}


class WireModel(BaseModel):
    """Strict: "5" is no number, NaN is none either, and an unknown field is an error."""

    # A limit, even one that says nothing, has strings looked through for halves of characters, which nothing encodes.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, str_min_length=0)


def unsupported(what: str) -> PydanticCustomError:
    """The error for something OpenAI defines and this server does not serve yet."""
    # As a template value, so that braces in `what` stay text.
    return PydanticCustomError("unsupported_parameter", "{what} is not served yet", {"what": what})


def invalid(message: str, param: str | None = None) -> PydanticCustomError:
    """The error for a value of the wrong form; `param` names it where several fields were looked at."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message, "param": param})


def described(**schema: Any) -> Any:
    """The JSON schema of what a validator takes before it brings it to one form."""
    return Annotated[object, WithJsonSchema(schema)]


def neutral(*values: object, otherwise: str | None = None) -> BeforeValidator:
    """A field that is not served: null and `values` mean "off" and pass, all else is refused.

    `otherwise` says why it never will be and what to send instead; without it the field is not served yet.
    """

    def refuse_others(value: object) -> object:
        # 1 == True in Python; in JSON they are different things.
        if value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
            return value
        raise unsupported("This value") if otherwise is None else invalid(otherwise)

    reason = f"{otherwise or 'not served yet'}."
    taken = described(
        type=["null", *(_JSON_TYPES[type(each)] for each in values)],
        enum=[None, *values],
        description=reason[0].upper() + reason[1:],
    )
    return BeforeValidator(refuse_others, json_schema_input_type=taken)


Ignored = Annotated[object, Field(description="Accepted; changes nothing in the answer.")]


def text_parts(*kinds: str) -> BeforeValidator:
    """A string, or a list of parts of these types, whose texts are joined."""

    def joined(content: object) -> object:
        if not isinstance(content, list):
            return content
        return "".join(_part_text(number, part, kinds) for number, part in enumerate(content))

    part = {
        "type": "object",
        "properties": {"type": {"enum": [*kinds]}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    taken = described(anyOf=[{"type": "string"}, {"type": "array", "items": part}])
    return BeforeValidator(joined, json_schema_input_type=taken)


def _part_text(number: int, part: object, kinds: tuple[str, ...]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in kinds:
        raise unsupported(f"Content of type {kind[:32]!r} (part {number})")
    if not isinstance(part, dict) or kind not in kinds or not isinstance(part.get("text"), str):
        raise invalid(f"Content part {number} must be an object {{'type': {kinds[0]!r}, 'text': '...'}}")
    return str(part["text"])


MessageText = Annotated[
    str, text_parts("text"), Field(description="A string, or a list of text parts, which are joined.")
]


def _stop_list(stop: object) -> object:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise invalid("stop must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS or not all(1 <= len(each) <= MAX_STOP_LENGTH for each in stops):
        raise invalid(f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters each")
    return stops


_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_StopInput = _StopString | Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS)] | None
StopStrings = Annotated[list[str], BeforeValidator(_stop_list, json_schema_input_type=_StopInput)]


Prompt = str | list[int]


def _prompt_list(prompt: object) -> object:
    is_several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    prompts = prompt if isinstance(prompt, list) and is_several else [prompt]
    if len(prompts) > MAX_PROMPTS:
        raise invalid(f"prompt takes at most {MAX_PROMPTS} prompts in one request")
    if all(map(_is_text, prompts)) or all(map(_is_token_ids, prompts)):
        return prompts
    raise invalid("prompt must be a string, a list of token ids, or a list of strings or of such lists")


def _is_text(prompt: object) -> bool:
    if not isinstance(prompt, str):
        return False
    try:
        prompt.encode()  # pydantic looks for lone surrogates in plain strings only, not in a union
    except UnicodeEncodeError:
        raise invalid("prompt is not valid Unicode text") from None
    return True


def _is_token_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and all(type(each) is int and each >= 0 for each in prompt)


_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Several = Field(min_length=1, max_length=MAX_PROMPTS)
_PromptInput = str | _TokenIds | Annotated[list[str], _Several] | Annotated[list[_TokenIds], _Several]
Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_prompt_list, json_schema_input_type=_PromptInput),
    Field(description="A string or a list of token ids, or a list of such: each is answered by itself."),
]


def _bias_by_token(bias: object) -> object:
    if bias is None:
        return {}
    if not isinstance(bias, dict) or len(bias) > MAX_BIASED_TOKENS:
        raise invalid(f"logit_bias must be an object of at most {MAX_BIASED_TOKENS} token ids and their biases")
    for token_id, value in bias.items():
        if not (isinstance(token_id, str) and token_id.isascii() and token_id.isdecimal() and len(token_id) <= 10):
            raise invalid(f"logit_bias names the token {str(token_id)[:32]!r}, which is no token id")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX_BIAS <= value <= MAX_BIAS:
            raise invalid(f"the bias of token {token_id} must be a number from -{MAX_BIAS} to {MAX_BIAS}")
    return {int(token_id): float(value) for token_id, value in bias.items()}


_BiasInput = described(
    type=["object", "null"],
    propertyNames={"pattern": "^[0-9]{1,10}$"},
    additionalProperties={"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    maxProperties=MAX_BIASED_TOKENS,
)
LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_bias_by_token, json_schema_input_type=_BiasInput),
    Field(description="Token id to what is added to its logit."),
]


def _plain_variables(variables: object) -> object:
    if variables is None:
        return None
    if not isinstance(variables, dict) or len(variables) > MAX_TEMPLATE_VARIABLES:
        raise invalid(f"chat_template_kwargs must be an object of at most {MAX_TEMPLATE_VARIABLES} variables")
    for name, value in variables.items():
        if not (value is None or isinstance(value, str | int | float)):
            raise invalid(f"the variable {name[:64]!r} must be a string, a number, true, false or null")
    return _is_plain_json(variables)


_VariablesInput = described(
    type=["object", "null"],
    additionalProperties={"type": ["string", "number", "boolean", "null"]},
    maxProperties=MAX_TEMPLATE_VARIABLES,
)
TemplateVariables = Annotated[
    dict[str, Any],
    BeforeValidator(_plain_variables, json_schema_input_type=_VariablesInput),
    Field(description="Variables for the chat template."),
]


def _not_too_deep(schema: object) -> object:
    """Whoever reads it goes down as deep as it is nested, and so must end somewhere."""
    layer, depth = [schema], 0
    while layer := [inner for each in layer if isinstance(each, dict | list) for inner in _members(each)]:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise invalid(f"a JSON schema may be nested {MAX_SCHEMA_DEPTH} levels deep")
    return schema


def _members(value: dict[str, Any] | list[Any]) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


def _is_plain_json(value: object) -> object:
    """Inside of values without types pydantic does not look."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise invalid("not valid Unicode text: it has one half of a character that is written as two") from None
    except ValueError:
        raise invalid("a number is not finite") from None
    return value


JsonSchema = Annotated[dict[str, Any], AfterValidator(_not_too_deep), AfterValidator(_is_plain_json)]


class ScaledAdapter(WireModel):
    """One adapter of a request, how strongly it counts, and how much of its rank: by default as it was trained."""

    name: Annotated[str, Field(max_length=MAX_REFERENCE_LENGTH, description="A reference, as team/sql@prod.")]
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0
    rank: Annotated[
        int | None,
        Field(ge=1, le=MAX_RANK, description="Only the first so many ranks at each site; by default all."),
    ] = None


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
