"""Adapter methods that are known and not served, by `peft_type`: why, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping

AS_LORA = "convert it with PEFT's save_as_lora where it was trained, and upload the result."
TRAIN_ANOTHER = "train one of the methods that this server takes."

REFUSED_METHODS: Mapping[str, str] = {
    "ADAMSS": "the file does not say which outputs belong to which of its subspaces, which clustering the base's "
    f"weights gave; {TRAIN_ANOTHER}",
    "ADAPTION_PROMPT": f"its prompts have an attention of their own inside the base's layers; {TRAIN_ANOTHER}",
    "BONE": "it is MiSS's older form, which PEFT does not read either; convert the file with PEFT's "
    "scripts/convert-bone-to-miss.py.",
    "FROD": "its update has full rank, and it replaces the base's weights with a decomposition that all its modules "
    f"share; {TRAIN_ANOTHER}",
    "GLORA": f"its update has full rank and changes with the base's weights and biases; {TRAIN_ANOTHER}",
    "LILY": "its router averages over all tokens of a batch, so that one request would change another's answer; "
    f"{TRAIN_ANOTHER}",
    "MIXED": "it names several adapters of different methods; upload each of them by itself.",
    "OSF": f"it replaces the base's weights by their own decomposition, of almost full rank; {TRAIN_ANOTHER}",
    "POLY": f"it needs a task with every request, to choose among its skills; {TRAIN_ANOTHER}",
    "PSOFT": "the file lacks the two factors it was trained with; they are singular vectors of the base, whose signs "
    f"differ from machine to machine; {AS_LORA}",
    "RANDLORA": f"its update is a sum of full rank over random matrices; {AS_LORA}",
    "SHADOW": f"it runs a second network beside the base, from a model that the config names; {TRAIN_ANOTHER}",
    "WAVEFT": f"the file lacks the places of its wavelet coefficients, which torch drew from a seed; {AS_LORA}",
    "XLORA": "it routes every token over adapters that its config names, in a second pass of the base; upload those "
    "adapters by themselves and mix them in the request.",
}
