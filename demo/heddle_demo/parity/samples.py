"""All samples, in the order of the table."""

from __future__ import annotations

from heddle_demo.parity.combined_samples import COMBINED_SAMPLES
from heddle_demo.parity.formula_samples import FORMULA_SAMPLES
from heddle_demo.parity.peft_samples import PEFT_SAMPLES
from heddle_demo.parity.sample import Sample

SAMPLES: tuple[Sample, ...] = (*PEFT_SAMPLES, *FORMULA_SAMPLES, *COMBINED_SAMPLES)
