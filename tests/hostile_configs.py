"""Configs that must be refused beside sound weights: broken text, bombs, numbers out of range, options not served."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

from adapter_samples import BASE, lora_config
from heddle_adapters.method import METHODS
from heddle_adapters.methods.refused_methods import REFUSED_METHODS
from hostile_case import Bytes, Cases, bad_config, bad_config_text, bad_rank, honest, shown

MIB = 2**20
HUGE_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400 + ".0"]


def config_texts() -> Cases:
    text = honest().config
    bare = text[:-1]
    objects = {
        f"{value!r} for an object": bad_config_text("must be a JSON object", value)
        for value in (b"[]", b'"LORA"', b"7", b"1.5", b"true", b"null", b"[{}]", b'["peft_type", "LORA"]')
    }
    broken: dict[str, Bytes] = {
        "empty": b"",
        "a space": b" ",
        "a NUL": b"\0",
        "zeros": bytes(512),
        "half": text[: len(text) // 2],
        "without its last brace": bare,
        "two objects": text + text,
        "then a comma": text + b",",
        "then a NUL": text + b"\0",
        "trailing comma": bare + b",}",
        "comment": text.replace(b"{", b"{// yes\n", 1),
        "single quotes": text.replace(b'"', b"'"),
        "Python's dict": repr(lora_config()).encode(),
        "YAML": b"peft_type: LORA\nr: 2\n",
        "YAML object": b"!!python/object/apply:os.system ['id']",
        "XML bomb": b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><x>&b;</x>',
        "TOML": b'peft_type = "LORA"\n',
        "byte order mark": b"\xef\xbb\xbf" + text,
        "line break in a string": text.replace(b"LORA", b"LO\nRA"),
        "bad escape": text.replace(b"LORA", b"LO\\xRA"),
        "hexadecimal": text.replace(b'"r": 2', b'"r": 0x2'),
        "leading zero": text.replace(b'"r": 2', b'"r": 02'),
        "plus sign": text.replace(b'"r": 2', b'"r": +2'),
        "UTF-16 without a mark": text.decode().encode("utf-16-le"),
        "UTF-32 without a mark": text.decode().encode("utf-32-le"),
        "zip": b"PK\x03\x04" + text,
        "template": b"{{ ''.__class__.__mro__ }}",
    }
    syntax = {name: bad_config_text("is not JSON", content) for name, content in broken.items()}
    encodings = {
        "UTF-16": text.decode().encode("utf-16"),
        "UTF-32": text.decode().encode("utf-32"),
        "gzip": gzip.compress(text),
        "pickle": pickle.dumps(lora_config()),
        "weights": honest().weights + b"\xff",
        "Latin-1": text.replace(b"some/folder", "é".encode("latin-1")),
        "overlong": text.replace(b"some/folder", b"\xc0\xaf"),
        "encoded surrogate": text.replace(b"some/folder", b"\xed\xa0\x80"),
    }
    encoded = {name: bad_config_text("not UTF-8", content) for name, content in encodings.items()}
    fields = ["peft_type", "r", "lora_alpha", "target_modules", "bias"]
    twice = {
        f"{field} twice": bad_config_text("more than once", bare + f', "{field}": null}}'.encode()) for field in fields
    } | {
        "r twice, once escaped": bad_config_text("more than once", bare + b', "\\u0072": 8}'),
        "a key twice in rank_pattern": bad_config_text("more than once", bare + b', "rank_pattern": {"q": 2, "q": 8}}'),
        "a key twice in alpha_pattern": bad_config_text("more than once", bare + b', "alpha_pattern": {"": 2, "": 8}}'),
        "a key twice in loftq_config": bad_config_text("more than once", bare + b', "loftq_config": {"a": 1, "a": 2}}'),
        "a key twice deep down": bad_config_text("more than once", bare + b', "x": [[{"y": {"a": 1, "a": 2}}]]}'),
        "a hostile key twice": bad_config_text("more than once", bare + b', "\\u001b\\u202e": 1, "\\u001b\\u202e": 2}'),
        "a long key twice": bad_config_text("more than once", bare + b', "%s": 1, "%s": 1}' % ((b"k" * 100_000,) * 2)),
    }  # fmt: skip
    numbers = {
        f"{field} {shown(number)}": bad_config_text("not finite", bare + f', "{field}": {number}}}'.encode())
        for field in ("lora_dropout", "eva_config", "unknown")
        for number in HUGE_NUMBERS
    }
    return objects | syntax | encoded | twice | numbers


def config_bombs() -> Cases:
    def padded(size: int, filler: bytes = b"x") -> bytes:
        return (
            honest().config[:-1]
            + b', "revision": "'
            + filler * ((size - len(honest().config) - 16) // len(filler))
            + b'"}'
        )

    sizes = {
        f"{size} bytes": bad_config_text("at most 1048576", partial(padded, size))
        for size in (MIB + 100, 2 * MIB, 10 * MIB)
    }
    nested = {
        f"{count} times {opening.decode()}": bad_config_text("nested too deeply", opening * count)
        for opening in (b"[", b'{"a":', b'[{"":')
        for count in (2_000, 20_000, 25_000)
    }
    fields = ["r", "lora_alpha", "init_lora_weights", "rank_pattern", "peft_type", "use_rslora"]
    fields += ["heddle_base_fingerprint"]
    deep = {
        f"{field} nested {count} deep": bad_config_text(
            field if count < 1000 else "nested too deeply", _with_field(field, "[" * count + "]" * count)
        )
        for field in fields
        for count in (100, 500, 5_000)
    }
    items = ("[]", "{}", "0", "1e1", '""', '{"a":0}')
    broad = {
        f"1 MiB of {item}": bad_config_text(
            "200000 values",
            partial(_with_field, "lora_alpha", f"[{','.join([item] * (1_000_000 // (len(item) + 1)))}]"),
        )
        for item in items
    }
    digits = {
        f"{field} of {sign}{count} digits": bad_config_text("integer of", _with_field(field, sign + "9" * count))
        for field in ("r", "lora_alpha")
        for count in (20, 5_000, 1_000_000)
        for sign in ("", "-")
    }
    members: dict[str, dict[str, Any]] = {
        "rank_pattern of 100,000": {"rank_pattern": {str(number): 1 for number in range(70_000)}},
        "alpha_pattern of 20,000": {"alpha_pattern": {f"m{number}": 1 for number in range(20_000)}},
        "20,000 unknown options": {f"option{number}": None for number in range(20_000)},
        "20,000 options in an option": {"eva_config": {f"option{number}": None for number in range(20_000)}},
    }
    crowded = {name: bad_config("more than the 16384 allowed", **changes) for name, changes in members.items()}
    keys: dict[str, Callable[[int], str]] = {
        "plain": lambda number: f"option{number}",
        "long": lambda number: "k" * 10_000 + str(number),
        "unprintable": lambda number: "\U000e0001" * 300 + str(number),
        "control characters": lambda number: "\x1b[2J\r\n" * 100 + str(number),
        "surrogates": lambda number: "\ud800" * 300 + str(number),
        "quotes": lambda number: "'\"\\" * 100 + str(number),
    }
    unknown = {
        f"90 {kind} options": bad_config("and 70 more", **{key(number): 1 for number in range(90)})
        for kind, key in keys.items()
    }
    return sizes | nested | deep | broad | digits | crowded | unknown


def _with_field(field: str, value: str) -> bytes:
    """The honest config with one field's value given as text."""
    fields = {name: each for name, each in lora_config().items() if name != field}
    return json.dumps(fields)[:-1].encode() + f', "{field}": {value}}}'.encode()


WRONG_TYPES: tuple[Any, ...] = (None, True, False, "2", "", "two", [], [2], {}, {"r": 2})


def ranks() -> Cases:
    values = (*WRONG_TYPES, 0, -1, -2, -(10**18), 2.0, 1.5, 0.0, -0.5, 1e308, 5e-324, "NaN", "0x2", "2 ")
    wrong = {f"r {shown(value)}": bad_config("r must be a whole number of at least 1", r=value) for value in values}
    others = (1, 3, 4, 8, 64, 256, 257, 10**7, 2**31, 2**32 + 2, 2**62, 2**63 - 1, 2**63, 10**19 - 1)
    mismatching = {f"r {value} over rank 2": bad_rank("gives that module rank", r=value) for value in others}
    text = {
        f"r {number}": bad_config_text("not finite", _with_field("r", number))
        for number in ("NaN", "Infinity", "1e400")
    }
    return wrong | mismatching | text | {"r left out": _without("r", "gives that module rank 8")}


def _without(field: str, reason: str) -> Any:
    content = json.dumps({name: value for name, value in lora_config().items() if name != field}).encode()
    return bad_config_text(reason, content)._replace(param="adapter_model.safetensors")


def alphas() -> Cases:
    wrong = {
        f"lora_alpha {shown(value)}": bad_config("lora_alpha must be a number", lora_alpha=value)
        for value in (*WRONG_TYPES, "inf", "NaN", "1e3")
    }
    numbers = (20_001, 2e4 + 0.01, -20_001, 1e9, -1e9, 1e38, 3.5e38, 1e308, -1e308, 2**62, 10**19 - 1)
    large = {
        f"lora_alpha {shown(value)}": bad_config("at most 10000 is allowed", lora_alpha=value) for value in numbers
    }
    rooted = {
        f"rsLoRA's lora_alpha {shown(value)}": bad_config("at most 10000", lora_alpha=value, use_rslora=True)
        for value in (14_143, -14_143, 20_000, 1e308)
    }
    patterned = {
        f"alpha_pattern's {shown(value)}": bad_config("at most 10000", alpha_pattern={"v_proj": value})
        for value in (20_001, -20_001, 1e308, 10**19 - 1)
    }
    endless = {
        f"lora_alpha {shown(number)}": bad_config_text("not finite", _with_field("lora_alpha", number))
        for number in HUGE_NUMBERS
    }
    endless_patterns = {
        f"alpha_pattern's {shown(number)}": bad_config_text(
            "not finite", _with_field("alpha_pattern", f'{{"q_proj": {number}}}')
        )
        for number in HUGE_NUMBERS
    }
    return wrong | large | rooted | patterned | endless | endless_patterns


REGULAR_EXPRESSIONS = {
    "nested plus": "(a+)+$",
    "nested star": "(.*)*q_proj",
    "alternation": "(a|a)*b",
    "overlap": "(a|aa)+$",
    "long": "(x+x+)+y" * 40,
    "lookahead": "(?=.*a)(?=.*b).*",
    "back reference": r"(\w+)\1+$",
    "counted": "((a{1,100}){1,100}){1,100}",
    "wildcard": ".*",
    "class": "[qv]_proj",
    "choice": "q_proj|v_proj",
    "digits": r"layers\.\d+\.self_attn\.q_proj",
    "unbalanced": "(((((",
    "flags": "(?i)Q_PROJ",
    "comment": "(?#" + "x" * 400 + ")q_proj",
    "anchors": "^^q_proj$$",
    "empty": "",
    "space": "q_proj ",
    "line break": "q_proj\n",
    "slash": "../q_proj",
    "NUL": "q_proj\0",
    "escape": "q\\_proj",
    "look-alike": "q_pr\u043ej",
    "surrogate": "\ud800",
}


def patterns() -> Cases:
    fields = ("rank_pattern", "alpha_pattern")
    expressions = {
        f"{field} {kind}": bad_config(f"{field} key", **{field: {key: 2}})
        for field in fields
        for kind, key in REGULAR_EXPRESSIONS.items()
    }
    long = {
        f"{field} path of {len(key)} characters": bad_config("is over 512 characters", **{field: {key: 2}})
        for field in fields
        for key in ("q" * 513, "a." * 250_000 + "q_proj", "a\\." * 200_000 + "q_proj", "(a+)+" * 50_000)
    }
    late = {
        f"{field} with an expression after 10,000 paths": bad_config(
            "is a regular expression", **{field: {f"m{number}": 2 for number in range(10_000)} | {"(a+)+": 2}}
        )
        for field in fields
    }
    maps = {
        f"{field} {shown(value)}": bad_config(f"{field} must be an object", **{field: value})
        for field in fields
        for value in (True, 7, 1.5, "q_proj", [1], [["q_proj", 2]])
    }
    ranked = {
        f"rank_pattern value {shown(value)}": bad_config("must be a whole number", rank_pattern={"q_proj": value})
        for value in (*WRONG_TYPES, 0, -1, 2.0, 1e308)
    }
    scaled = {
        f"alpha_pattern value {shown(value)}": bad_config("must be a number", alpha_pattern={"q_proj": value})
        for value in (*WRONG_TYPES, "inf")
    }
    mismatching = {
        f"rank_pattern {key} {value}": bad_rank("gives that module rank", rank_pattern={key: value})
        for key in ("q_proj", "self_attn.v_proj", "^model.layers.0.self_attn.q_proj$")
        for value in (1, 3, 10**7, 2**63 - 1)
    }
    return expressions | long | late | maps | ranked | scaled | mismatching


OPTIONS: dict[str, tuple[Any, ...]] = {
    "use_dora": (1, "false", [0], {"a": 1}),
    "modules_to_save": (["lm_head"], ["embed_tokens", "lm_head"], "lm_head", [".*"], {"lm_head": 1}, True),
    "layer_replication": ([[0, 1]], [[0, 4], [2, 5]] * 500, [[0, 10**9]], "0-4"),
    "trainable_token_indices": ([0, 1], [-1], {"embed_tokens": [0]}, [10**12]),
    "target_parameters": (["feed_forward.experts.gate_up_proj"], ["q_proj.weight"], "x"),
    "alora_invocation_tokens": ([1, 2, 3], [0]),
    "arrow_config": ({"top_k": 3}, {"router_temperature": 1e308}),
    "megatron_config": ({"tensor_model_parallel_size": 2}, "megatron.core"),
    "use_bdlora": (True, 2, "yes", [2], {"nblocks": 2, "shards": 2}, {"nblocks": 3, "target_modules_bd_a": ["q_proj"]}),
    "use_qalora": (True, "yes"),
    "init_lora_weights": (
        "pissa_niter_16", "corda", "loftq", "lora_ga", "kasa", "other", "", 7, [], ["eva"], {"a": 1},
    ),
    "bias": ("boft_only", "None", "NONE", "none ", True, False, 0, [], ["none"], {"none": 1}),
    "use_rslora": ("true", 1, 0, 1.0, [], [True], {}),
    "lora_bias": ("true", 1, 0, 1.0, [], [True], {}),
}  # fmt: skip

UNKNOWN_OPTIONS: dict[str, Any] = {
    "trust_remote_code": True,
    "tokenizer_kwargs": {"trust_remote_code": True},
    "shadow_model": "someone/else",
    "adapters": {"0": "someone/else"},
    "auto_map": {"AutoModel": "evil--model.Model"},
    "_attn_implementation": "someone/kernels",
    "custom_modules": {"torch.nn.Linear": "os.system"},
    "runtime_config": {"ephemeral_gpu_offload": True},
    "quantization_config": {"load_in_4bit": True},
    "chat_template": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "path": "/etc/passwd",
    "weights": "../../other/adapter_model.safetensors",
    "url": "http://169.254.169.254/latest/meta-data",
    "state_dict": "gASVAAAA",
    "name": "victim",
    "adapter_name": "victim",
    "owner": "victim",
    "digest": "sha256:" + "0" * 64,
    "R": 2,
    "lora_r": 2,
    "rank": 2,
    "alpha": 4,
    "scaling": 1e9,
    "num_virtual_tokens": 10**8,
    "num_experts": 64,
    "ia3_config": {"a": 1},
    "__class__": "os.system",
    "__init__": {"__globals__": 1},
    "\u202eevil": 1,
    "\ud800": 1,
    "peft_type ": "LORA",
    "": 1,
}


def options() -> Cases:
    known = {
        f"{field} {shown(value)}": bad_config(field, **{field: value})
        for field, values in OPTIONS.items()
        for value in values
    }
    unknown = {
        f"unknown {shown(field)}": bad_config("this server does not know what it means", **{field: value})
        for field, value in UNKNOWN_OPTIONS.items()
    }
    variants: list[tuple[str, Any]] = [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("use_dora", True),
        ("use_bdlora", {"nblocks": 2}),
    ]
    together = {
        f"{field} {shown(value)} with KaSA": bad_config(
            f"{field} and kasa_config are set together", **{field: value}, kasa_config={"beta": 1e-4}
        )
        for field, value in [*variants, ("alora_invocation_tokens", [1])]
    }
    biased = {
        f"lora_bias with {shown(value)}": bad_config("lora_bias is true, which", lora_bias=True, **{field: value})
        for field, value in variants
    }
    transposed = {
        f"fan_in_fan_out with {field}": bad_config("fan_in_fan_out is true", fan_in_fan_out=True, **{field: value})
        for field, value in {"init_lora_weights": "olora", "kasa_config": {}}.items()
    }
    return known | unknown | together | biased | transposed


def methods() -> Cases:
    """Another method's name over a LoRA, of one that is served or not, and what is no method at all."""
    names = ["ADAPTION_PROMPT", "BOFT", "BONE", "C3A", "CPT", "FOURIERFT", "GRALORA", "HRA", "LILY"]
    names += ["LN_TUNING"]
    names += ["LOHA", "LOKR", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "POLY", "PREFIX_TUNING", "PROMPT_TUNING"]
    names += ["P_TUNING", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT", "XLORA"]
    names += [
        "lora",
        "LoRA",
        "LORA ",
        " LORA",
        "LORA\0",
        "ＬＯＲＡ",
        "PeftType.LORA",
        "",
        "null",
        "../LORA",
        "os.system",
    ]
    names += ["X" * 9999]
    untrue = {f"{shown(name)}": bad_config(reason_against(name), peft_type=name) for name in names}
    typed = {
        f"peft_type {shown(value)}": bad_config("peft_type must be a string", peft_type=value)
        for value in (7, 1.5, True, False, ["LORA"], {"LORA": 1}, [])
    }
    return untrue | typed | {
        "peft_type null": bad_config("peft_type is missing", peft_type=None),
        "empty object": bad_config_text("peft_type is missing", b"{}"),
        "one unknown key": bad_config_text("peft_type is missing", b'{"a": 1}'),
    }  # fmt: skip


def reason_against(peft_type: str) -> str:
    """What is wrong with a LoRA's config under that name."""
    if peft_type in REFUSED_METHODS:
        return "which is not served"
    return "does not know what it means" if peft_type in METHODS else "this server takes ADALORA"


def fingerprints() -> Cases:
    other = ["sha256:" + "f" * 64, "sha256:", "", "sha256", BASE.fingerprint[:-1], BASE.fingerprint + "0"]
    other += [BASE.fingerprint.upper()]
    other += [f" {BASE.fingerprint}", f"{BASE.fingerprint}\n", BASE.fingerprint.replace("0", "\uff10"), "*", "any"]
    other += ["x" * 100_000]
    other += ["\x1b[2J" * 100, "\ud800", "../../base"]
    wrong = {
        f"{shown(value)}": bad_config("heddle_base_fingerprint is", heddle_base_fingerprint=value) for value in other
    }
    typed = {
        f"{shown(value)}": bad_config("heddle_base_fingerprint must be a string", heddle_base_fingerprint=value)
        for value in (7, 0, True, False, [BASE.fingerprint], {BASE.fingerprint: 1}, [], {})
    }
    return wrong | typed
