"""`python -m heddle_kernels.cpu_kernels`: compile the kernels ahead of a first start."""

import time

import torch

from heddle_kernels.cpu_kernels.ops import CpuOps

started = time.monotonic()
for dtype in (torch.bfloat16, torch.float32):
    CpuOps().prepare((), dtype)
print(f"compiled the CPU kernels in {time.monotonic() - started:.1f} s")
