"""Weights files that are sound as files and name what they must not: paths, the base, other adapters, nothing."""

from __future__ import annotations

import json
from functools import partial

from adapter_samples import DOWN, Q, V, tensor_name
from heddle_adapters.canonical import Floats
from hostile_case import FIRST, A, B, Cases, Header, bad_header, bad_tensors, extra, honest_header, ones

NOT_A_PART = "that are not part of a LoRA adapter"


def hostile_names() -> Cases:
    odd = {
        "empty": "",
        "NUL": "model\0weight",
        "line break": f"{FIRST}\n",
        "carriage return": f"{FIRST}\r",
        "tab": f"\t{FIRST}",
        "delete": f"{FIRST}\x7f",
        "escape sequence": f"\x1b[2J{FIRST}",
        "bell": f"{FIRST}\a",
        "right to left": f"\u202e{FIRST}",
        "zero width": FIRST.replace("lora", "lo\u200bra"),
        "Cyrillic A": FIRST.replace("lora_A", "lora_\u0410"),
        "Greek alpha": FIRST.replace("lora_A", "lora_\u0391"),
        "full width": FIRST.replace("model", "\uff4dodel"),
        "full-width dot": FIRST.replace("q_proj.", "q_proj\uff0e"),
        "ligature": FIRST.replace("self", "sel\ufb01"),
        "combining": f"{FIRST}\u0301",
        "accent": FIRST.replace("model", "modèl"),
        "emoji": f"{FIRST}😀",
        "no-break space": f"{FIRST}\u00a0",
        "byte order mark": f"\ufeff{FIRST}",
        "beyond the basic plane": "\U000e0001" * 400,
        "513 characters": "n" * 513,
        "100,000 characters": f"base_model.model.{'x.' * 50_000}lora_A.weight",
    }
    named = {name: bad_header("1 to 512 printable", _renamed(value)) for name, value in odd.items()}
    surrogate = json.dumps(honest_header()).encode().replace(b"q_proj", b"q_proj\\ud800", 1)
    paths = ["../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "C:\\Windows\\x", "\\\\host\\share"]
    paths += ["file://host/etc/passwd"]
    paths += ["~/.ssh/id_rsa", "..%2f..%2fetc", "./x", "model/../../x", "$(id)", "`id`", "{{7*7}}"]
    paths += ["${jndi:ldap://x}", "%s%n"]
    paths += ["' OR 1=1 --", "<script>alert(1)</script>", "con", "-rf", "__proto__", "__class__.__init__.__globals__"]
    escaping = {f"{path} as a name": extra(NOT_A_PART, path) for path in paths}
    modules = {
        f"{path} as a module": extra("does not have", f"base_model.model.{path}.{A}", f"base_model.model.{path}.{B}")
        for path in paths
    }
    long = {
        "512 characters": extra("1 tensors that are not part", "n" * 512),
        "thousand long names": bad_header("and 980 more", _many_names, bytes(2000)),
        "thousand long modules": bad_header("and 995 more", partial(_many_names, f".{A}"), bytes(2000)),
        "backslashes": extra(NOT_A_PART, *("\\" * 500 + str(number) for number in range(40))),
        "quotes": extra(NOT_A_PART, *("'\"" * 250 + str(number) for number in range(40))),
    }
    return named | {"surrogate": bad_header("1 to 512 printable", surrogate)} | escaping | modules | long


def _renamed(name: str) -> Header:
    header = honest_header()
    return {name if key == FIRST else key: header[key] for key in header}


def _many_names(ending: str = "") -> bytes:
    names = (f"{number:03}{'x' * (500 - len(ending))}{ending}" for number in range(1000))
    entry = {"dtype": "F16", "shape": [1]}
    return json.dumps({name: {**entry, "data_offsets": [2 * n, 2 * n + 2]} for n, name in enumerate(names)}).encode()


def keys_of_the_base() -> Cases:
    """A loader that copied these into the shared model would change every tenant's answers."""
    layer = "model.layers.0"
    names = ["lm_head.weight", "lm_head.bias", "model.embed_tokens.weight", "model.norm.weight", "model.norm.bias"]
    names += [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight", f"{layer}.mlp.gate.weight"]
    names += [f"{Q}.weight", f"{Q}.bias", f"{V}.bias", f"{Q}.weight.absmax", f"{Q}.weight.quant_map", f"{Q}.scale"]
    names += [f"{Q}.weight.quant_state.bitsandbytes__nf4", f"{layer}.self_attn.rotary_emb.inv_freq", "model.weight"]
    owned = [f"{Q}.base_layer.weight", f"{Q}.base_layer.bias", f"{DOWN}.base_layer.weight.absmax"]
    absent = ["model.embed_tokens.base_layer.weight", "lm_head.base_layer.weight", f"{Q}.base_layer.base_layer.weight"]
    reasons = dict.fromkeys(names, NOT_A_PART) | dict.fromkeys(owned, "the base's own tensors cannot be uploaded")
    reasons |= dict.fromkeys(absent, "does not have")
    reasons |= {f"{DOWN}.base_layer.weight": f"has base_layer.weight for {DOWN}, but no lora_A.weight"}
    plain = {name: extra(reason, name) for name, reason in reasons.items()}
    prefixed = {
        f"prefixed {name}": extra(reason, tensor_name(name.rpartition(".")[0], name.rpartition(".")[2]))
        for name, reason in reasons.items()
    }
    inside = {
        "LoRA inside a base layer": extra("does not have", f"base_model.model.{Q}.base_layer.{A}"),
        "LoRA on the head": extra("does not have", f"base_model.model.lm_head.{A}", f"base_model.model.lm_head.{B}"),
        "LoRA on the norm": extra("does not have", f"base_model.model.model.norm.{A}"),
        "LoRA on the embedding": extra("does not have", f"base_model.model.model.embed_tokens.{A}"),
        "only the base": bad_tensors(NOT_A_PART, lambda tensors: _replace(tensors, f"{Q}.weight", "lm_head.weight")),
    }
    return plain | prefixed | inside


def _replace(tensors: dict[str, Floats], *names: str) -> None:
    tensors.clear()
    tensors.update({name: ones(8, 8) for name in names})


def keys_of_others() -> Cases:
    """PEFT's own loader puts `lora_A.<name>.weight` into whichever loaded adapter has that name."""
    segments = ["victim", "default", "other_tenant", "0", "team/sql", "sql@3", "base", "*", "weight", "lora_X", "."]
    named = {
        f"{part} of {segment}": extra(NOT_A_PART, tensor_name(Q, f"{part}.{segment}.weight"))
        for segment in segments
        for part in ("lora_A", "lora_B")
    }
    instead = {
        f"all under {segment}": bad_tensors(NOT_A_PART, partial(_renamed_parts, segment))
        for segment in ("victim", "default")
    }
    forms = ["base_model.model.base_model.model.{}", "base_model.{}", "model.{}", "victim.{}", "victim/{}"]
    forms += ["default.base_model.model.{}"]
    forms += ["base_model.model.model.{}", "adapters.victim.{}", "base_model.model.victim.{}", ".{}", " {}"]
    forms += ["base_model.model. {}"]
    nested = {
        form.format("..."): extra("does not have", form.format(f"{Q}.{A}"), form.format(f"{Q}.{B}")) for form in forms
    }
    spelled = ["lora_a.weight", "LORA_A.weight", "lora_A.Weight", "lora_A..weight", "lora_A.weight.", "lora_A"]
    spelled += ["lora_A.weight "]
    spelled += ["lora_A.weight.victim", "lora_A.weight.0", "lora_A/weight", "lora_AA.weight", "lora.A.weight"]
    spelled += ["lora_A.weights"]
    misspelled = {f"{part} for {A}": extra(NOT_A_PART, tensor_name(Q, part)) for part in spelled}
    twice = {
        f"{part} with and without the prefix": bad_tensors("keep one of them", partial(_twice, f"{Q}.{part}"))
        for part in (A, B)
    }
    return named | instead | nested | misspelled | twice


def _renamed_parts(segment: str, tensors: dict[str, Floats]) -> None:
    for name in list(tensors):
        tensors[f"{name.removesuffix('.weight')}.{segment}.weight"] = tensors.pop(name)


def _twice(name: str, tensors: dict[str, Floats]) -> None:
    tensors[name] = tensors[f"base_model.model.{name}"].copy()


def parts_nobody_serves() -> Cases:
    """Tensors of PEFT's other methods and options, in a file that says LoRA."""
    parts = ["lora_E", "lora_ranknum", "vera_lambda_b", "vera_lambda_d", "vera_A", "hada_w1_a", "hada_w2_b", "hada_t1"]
    parts += ["lokr_w1", "lokr_w2_a", "lokr_t2", "oft_R.weight", "oft_r", "boft_R", "boft_s", "hra_u"]
    parts += ["vblora_logits_A"]
    parts += ["ia3_l", "ln_tuning_layers.weight", "fourierft_spectrum", "bone_block", "miss_block", "road_theta"]
    parts += ["randlora_A"]
    parts += ["modules_to_save.weight", "modules_to_save.default.weight", "original_module.weight", "lora_mixer.weight"]
    parts += ["trainable_tokens_delta", "token_adapter.trainable_tokens_delta", "shira_weight", "c3a_kernel"]
    parts += ["adaption_gate", "lora_velora_embed", "lora_monteclora_sampler.std_prior"]
    unknown = {part: extra(NOT_A_PART, tensor_name(Q, part)) for part in parts}
    top = ["prompt_embeddings", "prompt_encoder.default.embedding.weight", "base_model.prompt_encoder.weight", "step"]
    top += ["x"]
    whole = {f"{name} at the top": extra(NOT_A_PART, name) for name in [*top, A, "weight", "base_model.model", "."]}
    known = {
        "magnitude": extra("the config has use_dora false", tensor_name(Q, "lora_magnitude_vector")),
        "diagonal": extra("the config has no kasa_config", tensor_name(Q, "lora_diag")),
        "embedding A": extra("does not have", tensor_name("model.embed_tokens", "lora_embedding_A")),
        "embedding B": extra("does not have", tensor_name("model.embed_tokens", "lora_embedding_B")),
        "embedding A of a linear layer": extra(NOT_A_PART, tensor_name(Q, "lora_embedding_A")),
        "embedding B of a linear layer": extra(NOT_A_PART, tensor_name(Q, "lora_embedding_B")),
        "bias without lora_bias": extra("the config has lora_bias false", tensor_name(Q, "lora_B.bias")),
    }
    return unknown | whole | known


def modules_that_are_not_there() -> Cases:
    modules = ["model.layers.1.self_attn.q_proj", "model.layers.-1.self_attn.q_proj"]
    modules += ["model.layers.00.self_attn.q_proj"]
    modules += ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.Q_proj"]
    modules += ["model.layers.0.self_attn.q_proj2"]
    modules += ["model.layers.0.self_attn.xq_proj", "model.layers.0.self_attn", "model.layers.0", "model", "q_proj"]
    modules += ["self_attn.q_proj"]
    modules += ["model.layers.0..self_attn.q_proj", "model.layers.0.self_attn.q_proj."]
    modules += ["model.layers.0.self_attn.q_proj.q_proj"]
    modules += ["model/layers/0/self_attn/q_proj", "model.layers.999999999999.self_attn.q_proj"]
    modules += ["transformer.h.0.attn.c_attn"]
    modules += ["model.layers.0.self_attn.q_proj ", ".".join("x" * 120), "model.layers.*.self_attn.q_proj", "..", ""]
    return {
        f"{module!r}": extra("does not have", f"base_model.model.{module}.{A}", f"base_model.model.{module}.{B}")
        for module in modules
    }
