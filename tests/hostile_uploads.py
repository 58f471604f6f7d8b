"""The corpus: uploads that must be refused, as attackers, broken tools and tired people would send them.

All are aimed at the base of `adapter_samples`; each is the honest upload of `hostile_case` with one thing changed.
"""

from __future__ import annotations

from collections.abc import Callable

import hostile_configs as configs
import hostile_files as files
import hostile_keys as keys
import hostile_promises as promises
import hostile_tensors as tensors
from hostile_case import Cases

FAMILIES: dict[str, Callable[[], Cases]] = {
    "prefix": files.prefixes,
    "format": files.other_formats,
    "header text": files.header_texts,
    "header bomb": files.header_bombs,
    "entry": files.entries,
    "dtype": files.dtypes,
    "shape": files.shapes_in_the_header,
    "offsets": files.offsets,
    "cut": files.cut_files,
    "name": keys.hostile_names,
    "base key": keys.keys_of_the_base,
    "tenant key": keys.keys_of_others,
    "part": keys.parts_nobody_serves,
    "module": keys.modules_that_are_not_there,
    "value": tensors.non_finite_values,
    "half": tensors.halves,
    "tensor": tensors.misfitting_tensors,
    "IA3": tensors.ia3_uploads,
    "config text": configs.config_texts,
    "config bomb": configs.config_bombs,
    "rank": configs.ranks,
    "alpha": configs.alphas,
    "pattern": configs.patterns,
    "option": configs.options,
    "promise": promises.broken_promises,
    "method": configs.methods,
    "fingerprint": configs.fingerprints,
}


def hostile_uploads() -> Cases:
    """Every case by its name."""
    return {f"{family}: {name}": case for family, cases in FAMILIES.items() for name, case in cases().items()}
