"""How the demo trains what is more than packed chats through PEFT: virtual tokens, bottlenecks and ReFT.

All over the base's dequantised twin: bitsandbytes' products for the CPU depend on how many rows they have. The
bottlenecks' module was compared once with the `adapters` library 1.3.0 itself, over a tiny Llama: logits within 2e-7.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from heddle_adapters.positions import Positions
from heddle_demo.adapters import IN_FRENCH, RECIPES, Recipe, load_adapter, start_from
from heddle_demo.bottleneck import BottleneckConfig, BottleneckModel
from heddle_demo.chat import Chat, encode
from heddle_demo.data import BASE_DIR, DATA_DIR
from heddle_demo.fit import IGNORED, answer_loss, collate, logits
from heddle_demo.parity.dequantised import dequantised_twin
from heddle_demo.reft import ReftConfig, ReftModel, answer_token_of, edited_tokens
from heddle_demo.tokenizer import load_tokenizer
from tolerances import LOGITS_FP32, MIN_EFFECT_FP32

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # raised by PEFT

TOKENIZER = load_tokenizer(BASE_DIR)
ANSWER_TOKEN = answer_token_of(TOKENIZER)
CHATS = [
    Chat((("What is 2 plus 3?", "5"),)),
    Chat((("Hi", "Hello!"), ("Where does a bee live?", "A bee lives in a hive."))),
    Chat((("What colour is grass?", "Grass is green."),), "You are a helpful assistant."),
]
REFT = ReftConfig(rank=4, layers=(1, 4), num_first=3, num_last=2)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    twin = dequantised_twin(BASE_DIR, double_quantization=True)
    assert isinstance(twin, LlamaForCausalLM)
    return twin


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.inference_mode()
def alone(model: torch.nn.Module, chat: Chat) -> Tensor:
    """The logits of one chat by itself, without any padding; [length, vocabulary]."""
    token_ids = torch.tensor([encode(TOKENIZER, chat)[0]])
    positions = {"position_ids": torch.arange(token_ids.shape[1])[None]} if isinstance(model, ReftModel) else {}
    scores: Tensor = model(input_ids=token_ids, use_cache=False, **positions).logits[0, -token_ids.shape[1] :]
    return scores


@torch.inference_mode()
def together(model: torch.nn.Module, is_packed: bool) -> list[Tensor]:
    """The logits of every chat as training and scoring compute them."""
    batch = collate(TOKENIZER, CHATS, is_packed=is_packed)
    scores = logits(model, batch)
    lengths = [len(encode(TOKENIZER, chat)[0]) for chat in CHATS]
    if not is_packed:
        return [row[:length] for row, length in zip(scores, lengths, strict=True)]
    assert scores.shape[:2] == (1, sum(lengths))
    return list(torch.split(scores[0], lengths))


def check_batching(model: torch.nn.Module, base: torch.nn.Module, is_packed: bool) -> None:
    for chat, scores in zip(CHATS, together(model, is_packed), strict=True):
        expected = alone(model, chat)
        limit = LOGITS_FP32 * max(1.0, expected.abs().max().item())
        assert (scores - expected).abs().max() <= limit
        assert (expected - alone(base, chat)).abs().max() > MIN_EFFECT_FP32 * limit


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_before_padded_rows_are_as_before_one_chat(
    kind: type[PromptTuningConfig | PrefixTuningConfig], base: LlamaForCausalLM
) -> None:
    config: PeftConfig = kind(task_type="CAUSAL_LM", num_virtual_tokens=5)
    check_batching(randomise(get_peft_model(copy.deepcopy(base), config)), base, is_packed=False)


def test_a_prefix_starts_as_the_system_prompt_of_its_text(base: LlamaForCausalLM) -> None:
    prompt = TOKENIZER.encode(IN_FRENCH, add_special_tokens=False).ids
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt))
    model = get_peft_model(copy.deepcopy(base), config)
    start_from(model, TOKENIZER, IN_FRENCH)
    chat, _ = encode(TOKENIZER, CHATS[0])
    with torch.inference_mode():
        expected = base(input_ids=torch.tensor([prompt + chat]), use_cache=False).logits[0, len(prompt) :]
    limit = LOGITS_FP32 * max(1.0, expected.abs().max().item())
    assert (alone(model, CHATS[0]) - expected).abs().max() <= limit


def test_bottlenecks_in_packed_chats_are_as_alone(base: LlamaForCausalLM) -> None:
    check_batching(randomise(BottleneckModel(copy.deepcopy(base), BottleneckConfig(16))), base, is_packed=True)


def test_reft_in_packed_chats_is_as_alone(base: LlamaForCausalLM) -> None:
    check_batching(randomise(ReftModel(copy.deepcopy(base), REFT, ANSWER_TOKEN)), base, is_packed=True)


def test_prompts_are_edited_at_both_ends_and_answers_are_not() -> None:
    batch = collate(TOKENIZER, CHATS)
    is_edited = edited_tokens(batch.token_ids, batch.positions, ANSWER_TOKEN, Positions(num_first=3, num_last=2))[0]
    start = 0
    for chat in CHATS:
        token_ids, is_answer = encode(TOKENIZER, chat)
        prompt = len(token_ids) - is_answer[::-1].index(False)  # tokens before the last answer
        expected = [index < 3 or prompt - 2 <= index < prompt for index in range(len(token_ids))]
        assert is_edited[start : start + len(token_ids)].tolist() == expected
        start += len(token_ids)


def test_padding_is_never_edited() -> None:
    batch = collate(TOKENIZER, CHATS, is_packed=False)
    is_edited = edited_tokens(batch.token_ids, batch.positions, ANSWER_TOKEN, Positions(num_first=100, num_last=100))
    for row, chat in zip(is_edited, CHATS, strict=True):
        assert not row[len(encode(TOKENIZER, chat)[0]) :].any()


def test_a_reft_edit_is_its_formula(base: LlamaForCausalLM) -> None:
    model = randomise(ReftModel(copy.deepcopy(base), REFT, ANSWER_TOKEN))
    assert isinstance(model, ReftModel)
    p, w, b = (model.edits[1].get_parameter(name) for name in ("projection.weight", "source.weight", "source.bias"))
    h = torch.randn(7, 256)
    expected = h.double() + (h.double() @ (w - p).double().T + b.double()) @ p.double()
    assert torch.allclose(model.edits[1](h).double(), expected, atol=1e-5)


def test_training_keeps_the_projections_orthonormal(base: LlamaForCausalLM) -> None:
    model = ReftModel(copy.deepcopy(base), REFT, ANSWER_TOKEN)
    model.orthonormalise()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    before = model.edits[1].projection.weight.clone()
    batch = collate(TOKENIZER, CHATS)
    answer_loss(logits(model, batch), batch.labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    for edit in model.edits.values():
        p = edit.projection.weight
        assert torch.allclose(p @ p.T, torch.eye(REFT.rank), atol=1e-5)
    assert not torch.equal(before, model.edits[1].projection.weight)


@pytest.mark.parametrize("is_reft", [True, False], ids=["reft", "bottleneck"])
def test_what_is_saved_computes_the_same_once_loaded(is_reft: bool, base: LlamaForCausalLM, tmp_path: Path) -> None:
    def make() -> BottleneckModel | ReftModel:
        copied = copy.deepcopy(base)
        return ReftModel(copied, REFT, ANSWER_TOKEN) if is_reft else BottleneckModel(copied, BottleneckConfig(16))

    model, loaded = make(), make()
    randomise(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()  # as it is stored
    model.save(tmp_path / "saved")
    loaded.load(tmp_path / "saved")
    assert torch.equal(alone(model, CHATS[0]), alone(loaded, CHATS[0]))


def test_unpacked_rows_hold_one_chat_each_and_the_same_labels() -> None:
    packed, unpacked = collate(TOKENIZER, CHATS), collate(TOKENIZER, CHATS, is_packed=False)
    assert len(unpacked.token_ids) == len(CHATS)
    written = [batch.labels[batch.labels != IGNORED].tolist() for batch in (packed, unpacked)]
    assert written[0] == written[1]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_trained_files_load_into_their_recipe(recipe: Recipe, base: LlamaForCausalLM) -> None:
    folder = DATA_DIR / recipe.folder / recipe.name
    model = load_adapter(copy.deepcopy(base), recipe, TOKENIZER, folder)
    assert (alone(model, CHATS[0]) - alone(base, CHATS[0])).abs().max() > 0.1
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(folder / "adapter_model.safetensors").values())
