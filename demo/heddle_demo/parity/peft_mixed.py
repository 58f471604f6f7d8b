"""What PEFT itself does with two adapters of one method in one batch: right, wrong without a word, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from heddle_demo.parity.peft_sample import PeftSample, quiet

WRONG_FROM = 1e-4  # of logits in float32; what is right differs by 1e-6 at most
NAMES = ("first", "second")


def mixed_in_peft(sample: PeftSample, base: Any, prompt: list[int], folder: Path) -> str:
    """ "right", "wrong" or "refused": the row of each of two adapters in one batch, against itself alone."""
    for number, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        sample.save(base, folder / name, seed=100 + number)
    alone = [_logits(sample, base, [folder / name], prompt) for name in NAMES]
    try:
        mixed = _logits(sample, base, [folder / name for name in NAMES], prompt)
    except Exception:  # whatever it says
        return "refused"
    errors = [(mixed[row] - own[0]).abs().max().item() for row, own in enumerate(alone)]
    return "right" if max(errors) < WRONG_FROM else "wrong"


@torch.inference_mode()
def _logits(sample: PeftSample, base: Any, folders: list[Path], prompt: list[int]) -> Tensor:
    """A row for each folder's adapter, as PEFT's users ask for it: [num_folders, num_tokens, vocabulary]."""
    with quiet():
        model: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(folders[0]), adapter_name=NAMES[0]).eval()
        for name, folder in zip(NAMES[1:], folders[1:], strict=False):
            model.load_adapter(str(folder), adapter_name=name)
        options: dict[str, Any] = {name: torch.tensor([value] * len(folders)) for name, value in sample.inputs.items()}
        if len(folders) > 1:
            options["adapter_names"] = list(NAMES)
        logits: Tensor = model(input_ids=torch.tensor([prompt] * len(folders)), use_cache=False, **options).logits
        return logits[:, -len(prompt) :].float()
