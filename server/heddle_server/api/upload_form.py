"""The JSON schemas of an upload's parts, for the description of the API; `upload` reads them."""

from __future__ import annotations

from typing import Any

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.names import PART
from heddle_adapters.store_index import MAX_DESCRIPTION_CHARS, MAX_TAG_CHARS, MAX_TAGS, VISIBILITIES
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_server.api.upload import NAME_PART

Json = dict[str, Any]

_PARTS: Json = {
    NAME_PART: {"type": "string", "pattern": f"^(?:{PART}/)?{PART}$", "description": "What it is to be called."},
    CONFIG_FILE: {"type": "string", "contentMediaType": "application/json", "description": "As PEFT saves it."},
    WEIGHTS_FILE: {"type": "string", "format": "binary", "description": "As PEFT saves it."},
    "alias": {"type": "string", "description": "Comes to mean the new version."},
    "tags": {"type": "string", "description": f"{MAX_TAGS} of {MAX_TAG_CHARS} characters at most, between commas."},
    "description": {"type": "string", "maxLength": MAX_DESCRIPTION_CHARS},
    "pinned": {"type": "string", "enum": ["true", "false", ""]},
    "ttl_seconds": {"type": "string", "pattern": "^[0-9]*$", "description": "From now on; 0: for ever."},
    "visibility": {"type": "string", "enum": [*VISIBILITIES, ""], "description": "public: every tenant may use it."},
}


def _form(required: tuple[str, ...]) -> Json:
    return {
        "type": "object",
        "description": "The two files, and what is said of the adapter. An empty part counts as left out.",
        "properties": _PARTS,
        "required": list(required),
        "additionalProperties": False,
    }


UPLOAD_FORM = _form((NAME_PART, CONFIG_FILE, WEIGHTS_FILE))
TRIAL_FORM = _form((CONFIG_FILE, WEIGHTS_FILE))
