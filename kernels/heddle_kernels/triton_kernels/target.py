"""What the kernels run on: a GPU, or Triton's interpreter."""

from __future__ import annotations

import functools

import torch
from triton import knobs

# In the interpreter bfloat16 is held as its bit pattern and arithmetic on it is silently wrong (triton issue 11584):
# kernels take this as a constexpr and widen every value to float32 as soon as it is loaded.
INTERPRETED: bool = knobs.runtime.interpret
PROGRAMS_PER_PROCESSOR = 4  # of a persistent grid: enough warps to hide a load's latency
INTERPRETED_PROGRAMS = 3  # few, because they run one after another; more than one, so that dividing the work is tested


@functools.cache
def num_programs(device: torch.device) -> int:
    """Programs of a persistent grid: a fixed number, whatever the step brings, so that a CUDA graph fits every step."""
    if INTERPRETED:
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
