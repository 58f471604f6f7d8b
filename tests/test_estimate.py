"""`heddle estimate`: what it says of a base is what a server then holds, to the byte and to the page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.canonical import CompiledAdapter
from heddle_adapters.packer import Packer
from heddle_demo.bench.shapes import SHAPES
from heddle_demo.data import ADAPTERS_DIR, BASE_DIR
from heddle_server.adapter_footprint import all_linears, footprint
from heddle_server.api.serving import memory_line
from heddle_server.cli import app
from heddle_server.config import ConfigError, EngineConfig
from heddle_server.engine.engine import Engine
from heddle_server.engine.model_loader import DTYPES, quantization_of
from heddle_server.estimate.base_outline import outline
from heddle_server.estimate.capacity import Wanted, estimate
from heddle_server.estimate.quantized_bytes import QuantizedForm
from heddle_server.messages import ModelCard
from heddle_server.sizes import format_count, format_size
from test_dummy_weights import save_config
from test_packer import zero_rows
from tiny_models import FAMILIES, save_tiny_model

POOL_BYTES = 16 << 20
REORDERED = "bitsandbytes reordered"
ONE = Wanted(rank=16, num_adapters=1, context=32, targets="all")
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1000}


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    options = {"load_format": "dummy", "device": "cpu", "pool_bytes": POOL_BYTES, "store_path": str(folder), **settings}
    return EngineConfig(model_path=str(folder), model_name="base", **options)


def served(config: EngineConfig) -> ModelCard:
    engine = Engine(config)
    engine.close()
    return engine.model


def check_is_what_is_served(config: EngineConfig) -> None:
    card, said = served(config), estimate(config, ONE, None)
    assert said.base.sites == tuple(card.layout.by_path("linear").values())
    assert (said.base.quantization, said.base.dtype) == (card.layout.quantization, card.dtype)
    # What bitsandbytes computes in 16 bit on a CPU it repacks while it runs, linear by linear.
    is_settled = QuantizedForm.of(config, said.base.quantization, DTYPES[said.base.dtype], "cpu").product != REORDERED
    assert said.base.quantized_bytes == (
        card.quantized_bytes if is_settled else pytest.approx(card.quantized_bytes, rel=0.03)
    )
    assert said.base.weights_bytes - said.base.quantized_bytes == card.weights_bytes - card.quantized_bytes
    assert (said.base.page_bytes, said.num_pages, said.pool_bytes) == (card.page_bytes, card.num_pages, card.pool_bytes)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_weights_and_pages_are_those_of_a_server(family: str, dtype: str, quantization: str, tmp_path: Path) -> None:
    save_config(tmp_path, family, **({} if family == "gpt2" else WIDE))
    check_is_what_is_served(config_of(tmp_path, dtype=dtype, quantization=quantization))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(family: str, tmp_path: Path) -> None:
    save_config(tmp_path, family)
    check_is_what_is_served(config_of(tmp_path, dtype="bfloat16"))


@pytest.mark.parametrize(
    "settings",
    [
        {"double_quantization": False, "dtype": "float32"},
        {"base_cache": "bf16"},
        {"base_cache": "bf16", "kernels": "reference"},
        {"kernels": "reference"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_of_every_form_of_four_bit_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    save_config(tmp_path, "qwen2", **WIDE)
    check_is_what_is_served(config_of(tmp_path, **{"dtype": "bfloat16", **settings}))


def test_of_the_demo(tmp_path: Path) -> None:
    check_is_what_is_served(config_of(BASE_DIR, load_format="auto", store_path=str(tmp_path)))


def test_the_servers_memory_line_says_the_same(tmp_path: Path) -> None:
    config = config_of(BASE_DIR, load_format="auto", store_path=str(tmp_path))
    line, said = memory_line(served(config)), estimate(config, ONE, None)
    assert f" {format_count(said.most_tokens)} tokens or {said.most_adapters} adapters r16 on all linears" in line
    assert f"base {format_size(said.base.weights_bytes)} ({format_size(said.base.quantized_bytes)} in nf4" in line


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_of_a_checkpoint_that_is_quantised_already(quantization: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "plain", "llama", **WIDE)
    quantize = quantization_of(config_of(tmp_path, quantization=quantization), torch.bfloat16)
    options = {"dtype": torch.bfloat16, "quantization_config": quantize, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "quantised")
    check_is_what_is_served(config_of(tmp_path / "quantised", load_format="auto"))


def test_a_checkpoint_of_another_quantisation_is_refused(tmp_path: Path) -> None:
    save_config(tmp_path, "llama")
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="this checkpoint is quantised by gptq"):
        estimate(config_of(tmp_path), ONE, None)


def test_of_a_known_shape(tmp_path: Path) -> None:
    SHAPES["qwen2.5-0.5b"].write_config(tmp_path)
    check_is_what_is_served(config_of(tmp_path, max_model_len=1024))


@pytest.mark.parametrize("page_bytes", [1 << 14, 1 << 15, 196_608])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rank", [1, 16, 77])
def test_an_adapter_takes_the_pages_that_the_packer_gives_it(rank: int, dtype: str, page_bytes: int) -> None:
    card = outline(config_of(BASE_DIR), "cpu")
    sites = all_linears(card.sites, card.vocabulary_size)
    layout = BaseLayout("demo", "sha256:" + "0" * 64, "nf4", card.sites)
    updates = tuple(zero_rows(site, rank) for site in sites)
    packed = Packer(layout, dtype, page_bytes, {}).pack(CompiledAdapter("sha256:" + "1" * 64, updates))
    assert footprint(sites, rank, dtype, page_bytes).num_pages == packed.num_pages


@pytest.mark.parametrize(("name", "rank", "targets"), [("pirate", 8, "all"), ("french", 4, "attention")])
def test_its_file_is_as_large_as_peft_makes_it(name: str, rank: int, targets: Any) -> None:
    said = estimate(config_of(BASE_DIR), Wanted(rank, 1, None, targets), None)
    with safe_open(ADAPTERS_DIR / name / "adapter_model.safetensors", "numpy") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118  # it is no dict
    assert said.adapter_file_bytes == sum(4 * math.prod(shape) for shape in shapes)


def test_what_does_not_fit_waits() -> None:
    said = estimate(config_of(BASE_DIR, pool_bytes=4 << 20), Wanted(16, 100, 256, "all"), None)
    assert said.num_adapters == (said.num_pages - 16) // said.pages_per_adapter < 100
    assert said.num_requests == (said.num_pages - said.num_adapters * said.pages_per_adapter) // 16 >= 1
    assert said.host_bytes == 100 * said.bytes_per_adapter


def test_memory_that_is_named_is_shared_as_on_a_gpu() -> None:
    said = estimate(config_of(BASE_DIR, pool_bytes=None), ONE, 1 << 30)
    assert said.num_pages == int(((1 << 30) - said.base.weights_bytes) * 0.85) // said.base.page_bytes
    with pytest.raises(ConfigError, match="--memory is of no use beside --pool-bytes"):
        estimate(config_of(BASE_DIR), ONE, 1 << 30)
    with pytest.raises(ConfigError, match="the base alone takes all"):
        estimate(config_of(BASE_DIR, pool_bytes=None), ONE, 1 << 20)


def test_a_context_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--context is 9999; this model's own limit is \d+"):
        estimate(config_of(BASE_DIR), Wanted(16, 1, 9999, "all"), None)


def ask(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["estimate", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command(tmp_path: Path) -> None:
    wanted = ("--rank", "16", "--adapters", "3", "--context", "128", "--pool-bytes", "16MiB")
    shown = " ".join(ask(str(BASE_DIR), *wanted).split())
    assert "weights in nf4" in shown
    assert re.search(r"3 of 3 adapters of rank 16 are on the device at once, beside \d+ requests of 128 tokens", shown)
    numbers = json.loads(ask(str(BASE_DIR), "--memory", "1GiB", "--targets", "attention", "--json"))
    assert numbers["base"]["quantization"] == "nf4"
    assert numbers["memory_bytes"] == 1 << 30
    assert numbers["wanted"] == {"rank": 16, "num_adapters": 100, "context": 2048, "targets": "attention"}
    for arguments in (["/nowhere"], [str(BASE_DIR), "--context", "9999"], [str(BASE_DIR), "--dtype", "float8"]):
        refused = CliRunner().invoke(app, ["estimate", *arguments])
        assert (refused.exit_code, refused.stderr.startswith("heddle: ")) == (2, True)


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        ("512KiB", "A request of 2048 tokens does not fit: the pool holds 160."),
        ("6300KiB", "No adapter fits beside such a request"),
        ("10MiB", "The others wait in host memory and on disk"),
    ],
)
def test_what_is_too_much_is_said(pool: str, words: str) -> None:
    shown = " ".join(ask(str(BASE_DIR), "--pool-bytes", pool, "--dtype", "bfloat16").split())
    assert words in shown
    assert sum(shown.count(each) for each in ("does not fit:", "No adapter fits", "The others wait")) == 1


def test_config_json_is_all_it_needs(tmp_path: Path) -> None:
    SHAPES["llama-3.1-8b"].write_config(tmp_path)
    numbers = json.loads(ask(str(tmp_path), "--memory", "24GiB", "--json", "--rank", "8"))
    assert 5 << 30 < numbers["base"]["weights_bytes"] < 6 << 30
    assert numbers["kv_bytes_per_token"] == 32 * 2 * 8 * 128 * 2
