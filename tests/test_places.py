"""Norms, embeddings and blocks of other architectures than Llama, against PEFT: alone, and beside those who must not
notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, PromptTuningConfig, TrainableTokensConfig

from heddle_demo.parity.measure import CHUNKED, MIXED, RELOADED, WAYS, Bases, measure
from heddle_demo.parity.peft_sample import BaseOracle, PeftSample
from heddle_server.config import EngineConfig
from heddle_server.engine.engine import Engine
from tiny_models import VOCABULARY, make_tiny_model, save_tiny_model

TASK = "CAUSAL_LM"
TOKENS = [3, 17, 42]
NORMS = {
    "gemma2": ["input_layernorm", "post_feedforward_layernorm", "norm"],
    "gemma3_text": ["q_norm", "k_norm", "input_layernorm", "norm"],  # heads before tokens
    "qwen3": ["q_norm", "k_norm", "input_layernorm", "norm"],  # tokens before heads
    "olmo2": ["q_norm", "k_norm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],  # with biases
    "gpt_neox": ["input_layernorm", "post_attention_layernorm", "final_layer_norm"],
    "cohere": ["input_layernorm", "norm"],
    "mixtral": ["input_layernorm", "norm"],
}
EMBEDDINGS = {"gpt2": "wte", "gpt_neox": "embed_in"}


def prompts() -> list[list[int]]:
    drawn = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    drawn[:, 10:13] = torch.tensor(TOKENS)
    found: list[list[int]] = drawn.tolist()
    return found


def trained_tokens(embedding: str, base: Any) -> TrainableTokensConfig:
    return TrainableTokensConfig(token_indices=TOKENS, target_modules=[embedding], task_type=TASK)


def prompt_tuning(base: Any) -> PromptTuningConfig:
    config = base.config
    return PromptTuningConfig(
        task_type=TASK,
        num_virtual_tokens=5,
        token_dim=base.get_input_embeddings().weight.shape[1],
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
    )


@pytest.mark.parametrize("family", NORMS)
def test_equals_peft_beside_the_base(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", family)
    embedding = EMBEDDINGS.get(family, "embed_tokens")
    settings = {"quantization": "none", "dtype": "float32", "pool_bytes": 1 << 24}
    samples = [
        PeftSample("norms", lambda _: LNTuningConfig(target_modules=NORMS[family], task_type=TASK)),
        PeftSample(
            "tokens", lambda _: TrainableTokensConfig(token_indices=TOKENS, target_modules=[embedding], task_type=TASK)
        ),
        PeftSample("prompt", prompt_tuning),
    ]
    measured = measure(Bases(tmp_path / "model", model, None, settings, prompts(), 4), samples, tmp_path)
    assert measured.refusals == {}
    for name, errors in measured.errors.items():
        for way in WAYS:
            assert errors[way].worst <= 1e-5, f"{name} {way}: {errors[way].worst:.1e}"
            assert errors[way].largest_effect >= 1e-3, name
    oracle = BaseOracle(model)
    for way in (MIXED, CHUNKED, RELOADED):
        for answer in measured.answers[way][""]:
            expected = oracle.logits(answer.prompt + answer.token_ids, 0)[len(answer.prompt) - 1 : -1].log_softmax(-1)
            assert ((torch.stack(answer.logprobs) - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()


def test_a_scaled_head_leaves_a_neighbours_trained_rows(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    head = ["lm_head"]
    samples = [
        PeftSample(
            "tokens",
            lambda _: TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"], task_type=TASK),
        ),
        PeftSample("scale", lambda _: IA3Config(target_modules=head, feedforward_modules=head, task_type=TASK)),
    ]
    settings = {"quantization": "none", "dtype": "float32", "pool_bytes": 1 << 24}
    measured = measure(Bases(tmp_path / "model", model, None, settings, prompts(), 4), samples, tmp_path)
    assert measured.refusals == {}
    for errors in measured.errors.values():
        assert all(errors[way].holds_fp32 for way in WAYS)


def test_another_dtype_is_another_file_of_weights(tmp_path: Path) -> None:
    make_tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    for dtype in ("bfloat16", "float32"):
        settings: dict[str, Any] = {"quantization": "none", "dtype": dtype, "device": "cpu", "pool_bytes": 1 << 22}
        paths: dict[str, Any] = {"model_path": str(tmp_path / "model"), "store_path": str(tmp_path / "store")}
        Engine(EngineConfig(model_name="tiny", **paths, **settings)).close()
        (kept,) = (tmp_path / "store" / "base").iterdir()
        assert kept.name.endswith(f"-{dtype}.weights"), "one base at a time"


def test_what_lies_beside_the_weights_does_not_hinder(tmp_path: Path) -> None:
    make_tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "store" / "base" / "lost+found").mkdir(parents=True)
    settings: dict[str, Any] = {"quantization": "none", "dtype": "float32", "device": "cpu", "pool_bytes": 1 << 22}
    paths: dict[str, Any] = {"model_path": str(tmp_path / "model"), "store_path": str(tmp_path / "store")}
    Engine(EngineConfig(model_name="tiny", **paths, **settings)).close()
    assert len(list((tmp_path / "store" / "base").glob("*.weights"))) == 1
