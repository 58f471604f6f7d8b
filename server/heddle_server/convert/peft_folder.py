"""Folders that PEFT saved: pickles become safetensors, and Bone becomes MiSS, its later name."""

from __future__ import annotations

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_server.convert.choices import Choices
from heddle_server.convert.converted import Converted
from heddle_server.convert.source_folder import CannotConvert, SourceFolder

PICKLE = "adapter_model.bin"


def recognises(folder: SourceFolder) -> bool:
    return folder.has(CONFIG_FILE) and "peft_type" in folder.json(CONFIG_FILE)


def convert(folder: SourceFolder, choices: Choices) -> Converted:
    config = folder.json(CONFIG_FILE)
    is_bone = config["peft_type"] == "BONE"
    is_pickle = not folder.has(WEIGHTS_FILE)
    if not is_bone and not is_pickle:
        raise CannotConvert(
            f"{folder.path} needs no conversion; upload it as it is: heddle adapters push {folder.path}"
        )
    tensors = folder.tensors(WEIGHTS_FILE, PICKLE)
    remarks = [f"{PICKLE} is now {WEIGHTS_FILE}, tensor by tensor."] if is_pickle else []
    if is_bone:
        # As PEFT's own scripts/convert-bone-to-miss.py: the numbers mean the same.
        config = {**config, "peft_type": "MISS"}
        tensors = {name.replace(".bone_", ".miss_"): value for name, value in tensors.items()}
        remarks.append("Bone is called MiSS now; the tensors have its names and are the same.")
    return Converted(config, tensors, tuple(remarks))
