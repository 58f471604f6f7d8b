"""What methods without companions refuse: that anything of the base was trained beside their own tensors."""

from __future__ import annotations

from heddle_adapters.adapter_config import AdapterConfig

MODULES_TO_SAVE = {"modules_to_save": "is set: whole modules of the base are not replaced; train without it."}


def refuse_trained_biases(config: AdapterConfig) -> None:
    """Raises `InvalidAdapter` for a config that says that the base's biases were trained."""
    if config.fields.get("bias") not in (None, "none"):
        config.refuse("bias", "is not 'none', and trained biases of the base are not served; train with bias='none'.")
