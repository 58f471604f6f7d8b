"""Every numerical tolerance of the tests, with what it stands on. Widening one needs a reason here."""

from __future__ import annotations

import torch

# float32, end to end: max|Δlogit| <= LOGITS_FP32 * max(1, |logit|). PEFT's own folds differ by up to 9e-7; the
# attention of another implementation by up to 5e-7 per layer stack.
LOGITS_FP32 = 1e-5

# An adapter's own effect must be at least this many times the tolerance, or the comparison proves nothing.
MIN_EFFECT_FP32 = 100
MIN_EFFECT_BF16 = 10

# One engine's logprobs against another's over the same base in float32: other kernels, other orders of sums.
ENGINE_LOGPROBS = 1e-4

# Greedy tokens must be equal wherever the reference's best logit leads by more than this.
NEAR_TIE_MARGIN = 0.05

# bfloat16 rounding alone moves logits; the limit is this multiple of PEFT's own error in bfloat16, against the
# float32 truth, mean and 99th percentile over positions.
PEFT_ERROR_MULTIPLE_BF16 = 1.5

# One operation against its float64 reference, relative to the largest value, by the dtype of rows and activations.
OPERATION = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
