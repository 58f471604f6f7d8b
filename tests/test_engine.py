"""The engine in-process: stopping, seeds, preemption, poisoned pages, rope, quantisation, bases it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from engine_driver import make_request, run
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.store import AdapterStore
from heddle_demo.parity.dequantised import dequantised_twin
from heddle_server.config import ConfigError, EngineConfig
from heddle_server.engine.engine import Engine
from peft_samples import make_adapter
from test_families import assert_equals_transformers, make_engine, prompt_of
from tiny_models import LONGROPE, LONGROPE_LENGTH, VOCABULARY, make_tiny_model, save_tiny_model
from tolerances import NEAR_TIE_MARGIN


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_tiny_model(folder, "llama")


@pytest.fixture
def engine(llama: tuple[Path, PreTrainedModel]) -> Engine:
    return make_engine(llama[0])


def register(folder: Path, engine: Engine, model: PreTrainedModel, kinds: tuple[str, ...]) -> list[str]:
    """Digests of random adapters of these kinds, in the store that `engine` reads."""
    digests = []
    with AdapterStore(folder) as store:
        for number, kind in enumerate(kinds):
            saved = folder / f"saved-{number}"
            make_adapter(model, kind, saved, rank=2 + 3 * number, seed=number)
            config, weights = (saved / "adapter_config.json").read_bytes(), saved / "adapter_model.safetensors"
            digests.append(
                store.put(f"a{number}", read_checkpoint(config, weights, engine.model.layout), config, weights).digest
            )
    return digests


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        with torch.inference_mode():
            token_ids.append(int(model(torch.tensor([token_ids]), use_cache=False).logits[0, -1].argmax()))
    return token_ids[len(prompt) :]


def test_stops_where_it_is_told(engine: Engine, llama: tuple[Path, PreTrainedModel]) -> None:
    expected = greedy(llama[1], prompt_of(9, 1), 12)
    stop = expected[5]
    first = expected.index(stop)
    stopped, long = run(
        engine,
        [
            make_request(prompt_of(9, 1), max_tokens=12, stop_token_ids=(stop,)),
            make_request(prompt_of(9, 1), max_tokens=12),
        ],
    )
    assert stopped.token_ids == expected[: first + 1]
    assert stopped.finish_reason == "stop"
    assert long.token_ids == expected
    assert long.finish_reason == "length"


def test_end_of_sequence_is_obeyed_unless_ignored(llama: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    expected = greedy(llama[1], prompt_of(9, 1), 6)
    model = make_tiny_model("llama")
    model.generation_config.eos_token_id = [expected[2], 95]
    model.save_pretrained(tmp_path)
    engine = make_engine(tmp_path)
    obeyed, ignored = run(
        engine, [make_request(prompt_of(9, 1), max_tokens=6, ignore_eos=ignore) for ignore in (False, True)]
    )
    assert obeyed.token_ids == expected[: expected.index(expected[2]) + 1]
    assert obeyed.finish_reason == "stop"
    assert ignored.token_ids == expected


def test_the_context_ends_an_answer(llama: tuple[Path, PreTrainedModel]) -> None:
    engine = make_engine(llama[0], max_model_len=20)
    (answer,) = run(engine, [make_request(prompt_of(15, 1), max_tokens=100)])
    assert len(answer.token_ids) == 5
    assert answer.finish_reason == "length"


def test_a_seed_gives_the_same_answer_in_every_batch(engine: Engine) -> None:
    def ask(seed: int) -> Any:
        return make_request(prompt_of(7, 1), max_tokens=20, temperature=1.0, seed=seed)

    alone = [run(engine, [ask(seed)])[0].token_ids for seed in range(6)]
    together = run(engine, [ask(seed) for seed in range(6)] + [make_request(prompt_of(90, 2), max_tokens=30)])
    assert [answer.token_ids for answer in together[:6]] == alone
    assert len(set(map(tuple, alone))) == 6


def test_a_small_pool_preempts_and_changes_no_answer(llama: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, model = llama
    roomy = make_engine(folder, store_path=str(tmp_path))
    digests = [None, *register(tmp_path, roomy, model, ("lora", "ia3", "rslora"))]
    page_bytes = roomy.model.page_bytes
    # Room for the three adapters and 26 pages of KV; twelve sequences of 60 tokens want 48.
    adapter_pages = _adapter_pages(roomy, digests)
    tight = make_engine(folder, store_path=str(tmp_path), pool_bytes=(adapter_pages + 26) * page_bytes)
    answers = {}
    for name, engine in (("roomy", roomy), ("tight", tight)):
        requests = [make_request(prompt_of(20 + n, n), digests[n % 4], max_tokens=40) for n in range(12)]
        answers[name] = [answer.token_ids for answer in run(engine, requests)]
    assert tight.stats().num_preemptions > 0
    assert answers["tight"] == answers["roomy"]
    assert tight.stats().num_kv_pages == 0


def _adapter_pages(engine: Engine, digests: list[str | None]) -> int:
    run(engine, [make_request(prompt_of(4, 1), digest, max_tokens=1) for digest in digests])
    return engine.stats().num_adapter_pages


def test_64_streams_over_all_adapters_answer_as_alone(llama: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, model = llama
    engine = make_engine(folder, store_path=str(tmp_path), max_batch_tokens=200)
    digests = [None, *register(tmp_path, engine, model, ("lora", "rslora", "patterns", "lora_bias", "ia3"))]

    def ask(number: int) -> Any:
        return make_request(prompt_of(5 + number, number), digests[number % 6], max_tokens=12, num_logprobs=2)

    together = run(engine, [ask(number) for number in range(64)])
    for number, answer in enumerate(together):
        (alone,) = run(engine, [ask(number)])
        for position, (a, b, logprobs) in enumerate(
            zip(answer.token_ids, alone.token_ids, alone.logprobs, strict=True)
        ):
            best, second = logprobs.topk(2).values.tolist()
            if a != b:
                assert best - second < NEAR_TIE_MARGIN, f"request {number} differs at token {position}"
                break
    stats = engine.stats()
    assert stats.num_kv_pages == stats.num_running == stats.num_waiting == 0


def test_nothing_reads_what_an_earlier_owner_left_in_a_page(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, model = llama
    engine = make_engine(folder)
    engine._runner._kv.fill_(torch.nan)  # the worst that an earlier owner could leave
    answers = run(engine, [make_request(prompt_of(n, n), max_tokens=6, num_logprobs=VOCABULARY) for n in (3, 40, 17)])
    for answer in answers:
        assert_equals_transformers(answer, model)


def test_aborted_requests_leave_nothing_and_disturb_nobody(engine: Engine, llama: tuple[Path, PreTrainedModel]) -> None:
    doomed = [make_request(prompt_of(30, n), max_tokens=50) for n in range(5)]
    for request in doomed:
        engine.add(request)
    for _ in range(3):
        engine.step()
    for request in doomed:
        engine.abort(request.request_id)
        engine.check_integrity()
    (survivor,) = run(engine, [make_request(prompt_of(9, 1), max_tokens=5)])
    assert survivor.token_ids == greedy(llama[1], prompt_of(9, 1), 5)
    assert engine.stats().num_kv_pages == 0


def test_an_unknown_digest_fails_its_request_only(engine: Engine) -> None:
    lost, fine = run(
        engine, [make_request(prompt_of(5, 1), "sha256:" + "0" * 64), make_request(prompt_of(5, 1), max_tokens=3)]
    )
    assert lost.finish_reason == "error"
    assert lost.error_code is not None
    assert len(fine.token_ids) == 3


def test_an_adapter_that_overflows_fails_its_own_requests_only(
    llama: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder, model = llama
    engine = make_engine(folder, store_path=str(tmp_path))
    saved = tmp_path / "saved-huge"
    make_adapter(model, "lora", saved, rank=2)
    weights = saved / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(weights).items()}, weights)
    config = (saved / "adapter_config.json").read_bytes()
    with AdapterStore(tmp_path) as store:
        digest = store.put("huge", read_checkpoint(config, weights, engine.model.layout), config, weights).digest
    for temperature in (0.0, 1.0):
        lost, fine = run(
            engine,
            [
                make_request(prompt_of(9, 2), digest, temperature=temperature),
                make_request(prompt_of(9, 1), max_tokens=5),
            ],
        )
        assert lost.error_code == "adapter_load_failed"
        assert "too large for float32" in (lost.error_message or "")
        assert fine.token_ids == greedy(model, prompt_of(9, 1), 5)


def test_a_step_that_raises_ends_its_requests_and_not_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, llama: tuple[Path, PreTrainedModel]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "launch", broken)
        (lost,) = run(engine, [make_request(prompt_of(9, 1))])
    assert lost.error_code == "internal_error"
    assert "out of memory" not in (lost.error_message or ""), "the log has the reason, the client does not"
    (fine,) = run(engine, [make_request(prompt_of(9, 1), max_tokens=5)])
    assert fine.token_ids == greedy(llama[1], prompt_of(9, 1), 5)


def test_a_prompt_that_a_restarted_engine_cannot_take_is_an_error_and_no_crash(
    llama: tuple[Path, PreTrainedModel],
) -> None:
    engine = make_engine(llama[0], max_model_len=20)
    (lost,) = run(engine, [make_request(prompt_of(20, 1))])
    assert lost.error_code == "adapter_capacity"
    gone = make_request(prompt_of(20, 1))
    engine.add(gone)
    engine.abort(gone.request_id)
    assert engine.step() == []


def test_no_step_waits_for_a_collection_of_everything() -> None:
    script = """
import gc
from heddle_server.engine.engine_process import quieten_garbage_collection
quieten_garbage_collection()
generations = set()
gc.callbacks.append(lambda phase, info: generations.add(info["generation"]))
pages = [[number] for number in range(500_000)]
assert generations == {0, 1}, generations
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("max_model_len", "factors"), [(32, "short"), (128, "long")])
def test_longrope_is_fixed_by_the_longest_context_admitted(max_model_len: int, factors: str, tmp_path: Path) -> None:
    length = {"original_max_position_embeddings": LONGROPE_LENGTH}
    save_tiny_model(tmp_path, "phi3", rope_parameters=LONGROPE, **length)
    engine = make_engine(tmp_path, max_model_len=max_model_len)
    # transformers itself uses one set of factors throughout if both sets are the same.
    same = {**LONGROPE, "short_factor": LONGROPE[f"{factors}_factor"], "long_factor": LONGROPE[f"{factors}_factor"]}
    oracle = make_tiny_model("phi3", rope_parameters=same, **length)
    requests = [make_request(prompt_of(n, n), max_tokens=4, num_logprobs=VOCABULARY) for n in (6, max_model_len - 5)]
    for answer in run(engine, requests):
        assert_equals_transformers(answer, oracle)


def test_rope_that_depends_on_the_batch_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ConfigError, match=r"rope scaling \(dynamic\)"):
        make_engine(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_with_noise(tmp_path: Path) -> None:
    model = make_tiny_model("llama")
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ConfigError, match=r"lacks 3 of the weights.*layers\.1\.mlp"):
        make_engine(tmp_path)


def test_a_model_that_goes_around_the_attention_interface_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bloom", vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Bloom"):
        make_engine(tmp_path)


def test_a_model_with_another_way_from_token_to_token_is_refused(tmp_path: Path) -> None:
    """Every layer of this family also runs a state-space model over the whole flat batch."""
    config = AutoConfig.for_model(
        "falcon_h1", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="FalconH1"):
        make_engine(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 999}, "model's own limit is 256"),
        ({"pool_bytes": 1 << 10}, "page pool holds 0 tokens"),
        ({"pool_bytes": 1 << 17, "max_model_len": 200}, "Raise --pool-bytes"),
    ],
)
def test_impossible_sizes_are_refused_at_start(
    settings: dict[str, int], message: str, llama: tuple[Path, PreTrainedModel]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(llama[0], **settings)


@pytest.mark.parametrize("double_quantization", [True, False])
def test_nf4_equals_its_dequantised_twin(double_quantization: bool, llama: tuple[Path, PreTrainedModel]) -> None:
    engine = make_engine(llama[0], quantization="nf4", double_quantization=double_quantization)
    assert engine.model.layout.quantization == "nf4"
    assert 0 < engine.model.quantized_bytes < engine.model.weights_bytes
    twin = dequantised_twin(llama[0], double_quantization)
    requests = [make_request(prompt_of(n, n), max_tokens=4, num_logprobs=VOCABULARY) for n in (6, 50)]
    for answer in run(engine, requests):
        assert_equals_transformers(answer, twin)


def test_a_checkpoint_that_is_quantised_already_is_served_as_it_is(
    llama: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    quantised = AutoModelForCausalLM.from_pretrained(
        llama[0],
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    quantised.save_pretrained(tmp_path)
    engine = make_engine(tmp_path, quantization="none")
    assert engine.model.layout.quantization == "nf4"
    (answer,) = run(engine, [make_request(prompt_of(20, 1), max_tokens=4, num_logprobs=VOCABULARY)])
    assert_equals_transformers(answer, dequantised_twin(llama[0], double_quantization=False))


def test_the_fingerprint_tells_bases_and_formats_apart(llama: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    def fingerprint(make: Callable[[], Engine]) -> str:
        return make().model.layout.fingerprint

    save_tiny_model(tmp_path, "llama", rms_norm_eps=1e-5)
    first = fingerprint(lambda: make_engine(llama[0]))
    assert fingerprint(lambda: make_engine(llama[0], dtype="bfloat16")) == first
    assert fingerprint(lambda: make_engine(llama[0], quantization="nf4")) != first
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert fingerprint(lambda: make_engine(tmp_path)) != first


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_serves_the_same_answers(llama: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, model = llama
    engine = make_engine(folder, device="cuda", store_path=str(tmp_path))
    digests = [None, *register(tmp_path, engine, model, ("lora", "ia3"))]
    requests = [make_request(prompt_of(20 + n, n), digests[n], max_tokens=5, num_logprobs=VOCABULARY) for n in range(3)]
    answers = run(engine, requests)
    assert all(len(answer.token_ids) == 5 for answer in answers)
    assert_equals_transformers(answers[0], model)


def test_cuda_that_is_not_there_is_an_error_at_start(llama: tuple[Path, PreTrainedModel]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="no CUDA device"):
        make_engine(llama[0], device="cuda")


def test_config_errors_name_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"--quantization is 'gptq'; it must be one of nf4, fp4, int8, none"):
        EngineConfig(model_path="", model_name="", store_path="", quantization="gptq")  # type: ignore[arg-type]
