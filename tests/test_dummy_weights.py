"""Random weights for measuring: a folder with nothing but config.json is served, as the same model with weights is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from engine_driver import make_request, run
from heddle_server.config import EngineConfig, Quantization
from heddle_server.engine.attention import ATTENTION_NAME, register_attention
from heddle_server.engine.dummy_weights import make_dummy_model
from heddle_server.engine.engine import Engine
from heddle_server.engine.model_loader import LoadedModel, load_model, load_weights, quantization_of
from heddle_server.options import ServeOptions
from test_families import prompt_of
from tiny_models import COMMON, FAMILIES, VOCABULARY, save_tiny_model

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1000}
CPU = torch.device("cpu")


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    options = {"load_format": "dummy", "device": "cpu", "dtype": "float32", "pool_bytes": 1 << 22, **settings}
    return EngineConfig(model_path=str(folder), model_name="dummy", store_path=str(folder), **options)


def save_config(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides}).save_pretrained(folder)
    return folder


def dense(module: Any) -> Tensor:
    """What a quantised layer's bytes stand for."""
    if module.weight.dtype == torch.int8:
        scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
        weight: Tensor = int8_vectorwise_dequant(module.weight.data, scales)
    else:
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight.float()


@pytest.mark.parametrize("quantization", get_args(Quantization))
def test_config_json_is_enough_to_serve(quantization: str, tmp_path: Path) -> None:
    """The same answers in every run: the weights come from a seed."""
    save_config(tmp_path)
    answers = []
    for _ in range(2):
        engine = Engine(config_of(tmp_path, quantization=quantization))
        assert engine.model.layout.quantization == quantization
        requests = [make_request(prompt_of(n, n), max_tokens=6, num_logprobs=VOCABULARY) for n in (5, 40)]
        answers.append(run(engine, requests))
    for answer in answers[0]:
        assert answer.error_message is None
        assert torch.stack(answer.logprobs).isfinite().all()
    assert [answer.token_ids for answer in answers[0]] == [answer.token_ids for answer in answers[1]]


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_what_a_checkpoint_would_load_to(family: str, quantization: str, tmp_path: Path) -> None:
    """Each tensor has the shape and type of its counterpart, quantisation states included, and norms are at rest."""
    save_tiny_model(tmp_path, family)
    register_attention()
    quantize = quantization_of(config_of(tmp_path, quantization=quantization), torch.bfloat16)
    loaded = load_weights(
        tmp_path, quantize, dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME, device_map={"": CPU}
    )
    config = AutoConfig.from_pretrained(tmp_path)
    dummy = make_dummy_model(config, quantize, torch.bfloat16, CPU, ATTENTION_NAME)
    assert described(dummy) == described(loaded)
    for (name, buffer), (_, other) in zip(dummy.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    fresh = AutoModelForCausalLM.from_config(config)
    for name, parameter in fresh.named_parameters():
        if "norm" in name:
            assert torch.equal(dummy.get_parameter(name).float(), parameter.float()), name


def described(model: Any) -> dict[str, Any]:
    """What distinguishes two models with other numbers."""
    tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items() if "bias" not in name}
    # The JSON of a quantisation state has a mean in it, of another number of digits.
    tensors = {name: what for name, what in tensors.items() if "quant_state.bitsandbytes" not in name}
    modules = {name: type(module).__name__ for name, module in model.named_modules()}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return {"tensors": tensors, "modules": modules, "tied": tied, "quantised": getattr(model, "is_quantized", False)}


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quantization", [True, False])
def test_quantised_noise_is_scaled_by_its_fan_in(quantization: str, double_quantization: bool, tmp_path: Path) -> None:
    save_config(tmp_path, **WIDE)
    config = config_of(tmp_path, quantization=quantization, double_quantization=double_quantization)
    model = make_dummy_model(
        AutoConfig.from_pretrained(tmp_path), quantization_of(config, torch.float32), torch.float32, CPU, "sdpa"
    )
    for path in ("q_proj", "up_proj", "down_proj"):
        layer = next(module for name, module in model.named_modules() if name.endswith(path))
        weight = dense(layer)
        assert weight.shape == (layer.out_features, layer.in_features)
        assert weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.03)
        assert abs(weight.mean().item()) < 0.05 * weight.std().item()
        assert torch.corrcoef(weight).fill_diagonal_(0).abs().max() < 0.5, "rows repeat each other"


@pytest.mark.parametrize("quantization", get_args(Quantization))
def test_logits_are_finite_and_spread(quantization: str, tmp_path: Path) -> None:
    save_config(tmp_path, "qwen2", **WIDE, num_hidden_layers=8, tie_word_embeddings=True)
    loaded = load_model(config_of(tmp_path, quantization=quantization, dtype="bfloat16"))
    loaded.model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = loaded.model(torch.arange(3, 40)[None], use_cache=False).logits[0].float()
    assert logits.isfinite().all()
    assert 0.3 < logits.std(dim=-1).mean() < 3, "of one token, over the vocabulary"
    assert logits.std(dim=0).mean() > 0.1, "of one word, over the tokens"


def load(folder: Path, **settings: Any) -> LoadedModel:
    return load_model(config_of(folder, **settings))


def test_the_fingerprint_says_that_it_is_dummy_and_what_of(tmp_path: Path) -> None:
    folders = [save_config(tmp_path / str(layers), num_hidden_layers=layers) for layers in (1, 2)]
    fingerprints = {load(folder, quantization=name).fingerprint for folder in folders for name in ("nf4", "int8")}
    assert len(fingerprints) == 4
    assert all(fingerprint.startswith("dummy:") for fingerprint in fingerprints)
    assert load(folders[0]).fingerprint in fingerprints


def test_a_config_of_a_quantised_checkpoint_is_quantised_as_asked(tmp_path: Path) -> None:
    save_config(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert load(tmp_path).quantization == "nf4"
    assert load(tmp_path, quantization="none").quantization == "none"


def test_of_the_hub_only_the_description_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[list[str]]()

    def fetch(model: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for load_format in ("auto", "dummy"):
        config = ServeOptions(store=tmp_path, load_format=load_format).config("somebody/large")
        assert config.engine.load_format == load_format
    assert ["*.safetensors" in patterns for patterns in asked] == [True, False]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("quantization", get_args(Quantization))
def test_cuda_has_the_same_weights(quantization: str, tmp_path: Path) -> None:
    save_config(tmp_path, **WIDE)
    config = AutoConfig.from_pretrained(tmp_path)
    quantize = quantization_of(config_of(tmp_path, quantization=quantization), torch.bfloat16)
    here, there = (
        make_dummy_model(config, quantize, torch.bfloat16, torch.device(device), "sdpa") for device in ("cpu", "cuda")
    )
    for (name, parameter), (_, other) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert other.is_cuda, name
        assert (parameter != other.cpu()).float().mean() < 0.001, name  # quantising may round otherwise there
