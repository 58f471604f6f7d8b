"""Several adapters in one request, and adapters at a scale, against PEFT with all of them active at batch 1."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer

from engine_driver import make_request, run
from heddle_adapters.mix import AdapterPart
from parity_bench import VOCABULARY, Bench, assert_equals, assert_is_peft, make_bench, prompt_of
from peft_samples import tiny_gpt2, tiny_llama, tiny_qwen2

pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),  # PEFT, of merging, which nobody does
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT reads a property that transformers deprecates
]

MIXES: dict[str, dict[str, float]] = {
    "two": {"lora": 1.0, "rslora": 0.25},
    "weighted": {"lora": 0.5, "patterns": -0.75, "lora_bias": 2.0},
    "all": {"lora": 0.4, "rslora": 0.3, "patterns": 0.2, "lora_bias": 0.1},
    "scaled": {"rslora": 0.5},
    "scaled bias": {"lora_bias": 0.25},
    "products": {"ia3": 1.0, "ia3-2": 1.0},
    "weighted products": {"ia3_feedforward": 0.5, "ia3_feedforward-2": 1.5},
    "scaled product": {"ia3": 0.5},
}


@pytest.fixture(scope="module", params=[tiny_llama, tiny_qwen2, tiny_gpt2], ids=["llama", "qwen2", "gpt2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = make_bench(request.param, tmp_path_factory.mktemp("base"))
    for kind in ("ia3", "ia3_feedforward"):  # two of a kind: PEFT takes the first one's feed-forward modules for all
        bench.register(f"{kind}-2", kind, seed=77)
    return bench


def peft_mix(bench: Bench, scales: dict[str, float]) -> Any:
    """PEFT's model with all of these active, each at its scale.

    In float64: where random weights make a norm divide by next to nothing, PEFT's own float32 is off by 1.2e-5.
    """
    first, *others = scales
    model = PeftModel.from_pretrained(copy.deepcopy(bench.base), bench.folder / first, adapter_name=first)
    for kind in others:
        model.load_adapter(bench.folder / kind, kind)
    model.base_model.set_adapter(list(scales))
    for layer in model.modules():
        for kind, scale in scales.items():
            if isinstance(layer, LoraLayer) and kind in layer.lora_A:
                layer.set_scale(kind, scale)
            elif isinstance(layer, IA3Layer) and kind in layer.ia3_l:
                with torch.no_grad():  # half the adapter is half its distance from one, which changes nothing
                    layer.ia3_l[kind].copy_(1 + scale * (layer.ia3_l[kind] - 1))
    return model.double().eval()


def ask_mix(bench: Bench, scales: dict[str, float], length: int) -> Any:
    parts = tuple(bench.part(kind, scale) for kind, scale in scales.items())
    return make_request(prompt_of(length), parts, max_tokens=5, num_logprobs=VOCABULARY)


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_is_what_peft_computes_with_all_of_them_active(name: str, bench: Bench) -> None:
    (answer,) = run(bench.engine, [ask_mix(bench, MIXES[name], 20)])
    assert_equals(answer, peft_mix(bench, MIXES[name]), bench.base)


def test_all_mixes_and_their_parts_in_one_batch(bench: Bench) -> None:
    alone = [
        make_request(prompt_of(30), bench.digests[kind], max_tokens=5, num_logprobs=VOCABULARY)
        for kind in ["base", "lora", "ia3"]
    ]
    mixed = [ask_mix(bench, scales, 60 - 4 * number) for number, scales in enumerate(MIXES.values())]
    answers = run(bench.engine, [*alone, *mixed])
    for kind, answer in zip(("base", "lora", "ia3"), answers, strict=False):
        assert_is_peft(bench, kind, answer)
    for scales, answer in zip(MIXES.values(), answers[3:], strict=True):
        assert_equals(answer, peft_mix(bench, scales), bench.base)
    assert bench.engine.stats().num_kv_pages == 0


def test_a_scale_of_nothing_is_the_base_and_a_mix_is_never_taken_for_another(bench: Bench) -> None:
    prompt = prompt_of(50)
    part = bench.part("lora", 1.0)

    def ask(*parts: AdapterPart) -> list[float]:
        (answer,) = run(bench.engine, [make_request(prompt, parts, max_tokens=1, num_logprobs=VOCABULARY)])
        logprobs: list[float] = answer.logprobs[0].tolist()
        return logprobs

    base, whole = ask(), ask(part)
    assert ask(AdapterPart(part.digest, 0.0)) == pytest.approx(base, abs=1e-5)
    again = [ask(AdapterPart(part.digest, scale)) for scale in (0.5, 0.25, 0.5)]  # each over the others' warm prefixes
    assert again[0] == pytest.approx(again[2], abs=1e-5)
    different = [base, whole, again[0], again[1]]
    for number, one in enumerate(different):
        for other in different[number + 1 :]:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-2
