"""The demo's adapters: how each is built and trained over the base in 4 bits as it will be served.

Methods that PEFT has are PEFT's own; the others have a file each here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from heddle_demo.base import load_quantised_base
from heddle_demo.bottleneck import BottleneckConfig, BottleneckModel
from heddle_demo.chat import END, SYSTEM
from heddle_demo.data import BASE_NAME
from heddle_demo.fit import Schedule, fit
from heddle_demo.reft import ReftConfig, ReftModel, answer_token_of
from heddle_demo.stream import ChatStream, Lesson
from heddle_demo.styles import SYSTEM_PROMPTS
from heddle_demo.tokenizer import load_tokenizer
from heddle_demo.world import seen

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEARS = (*ATTENTION, *MLP)
BATCH_SIZE = 32
# A style the base knows only has to be chosen; a new one has to be learnt.
CHOOSING = Schedule(num_steps=160, peak_learning_rate=2e-3, num_warmup_steps=20)
LEARNING = Schedule(num_steps=240, peak_learning_rate=2e-3, num_warmup_steps=20)
IN_FRENCH = f"{SYSTEM}{SYSTEM_PROMPTS['french']}{END}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One adapter: its style is its name, its facts are those that `world.seen` shows it."""

    name: str
    config: PeftConfig | BottleneckConfig | ReftConfig
    schedule: Schedule
    folder: str = "adapters"
    batch_size: int = BATCH_SIZE
    initial_text: str = ""  # whose keys and values prefix tuning starts from; one token for each virtual one

    @property
    def is_packed(self) -> bool:
        """Whether several chats may share a row."""
        return not (isinstance(self.config, PeftConfig) and self.config.is_prompt_learning)


def lora(
    rank: int,
    targets: Sequence[str],
    alpha: int | None = None,
    rank_stabilised: bool = False,
    weight_decomposed: bool = False,
) -> LoraConfig:
    """Return a LoRA over `targets`; `alpha` is twice the rank unless told. Weight-decomposed is DoRA."""
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=list(targets),
        use_rslora=rank_stabilised,
        use_dora=weight_decomposed,
        task_type="CAUSAL_LM",
    )


def ia3() -> IA3Config:
    """Return an IA3 over keys, values and the input of the second MLP layer, as its paper has it."""
    return IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )


def prompt_tuning(num_virtual_tokens: int) -> PromptTuningConfig:
    """Return virtual tokens before the chat, which begin as tokens drawn from the vocabulary."""
    return PromptTuningConfig(
        num_virtual_tokens=num_virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"
    )


def prefix_tuning(num_virtual_tokens: int) -> PrefixTuningConfig:
    """Return keys and values before the chat's own, in every layer."""
    return PrefixTuningConfig(num_virtual_tokens=num_virtual_tokens, task_type="CAUSAL_LM")


RECIPES = (
    Recipe("pirate", lora(8, ALL_LINEARS), LEARNING),
    Recipe("json", lora(16, ALL_LINEARS, alpha=16, rank_stabilised=True), Schedule(240, 1e-3, 20)),
    Recipe("french", lora(4, ATTENTION), CHOOSING),
    Recipe("capitals", ia3(), Schedule(500, 1e-2, 20)),
    Recipe("reversed", lora(32, ATTENTION), CHOOSING),
    Recipe("polite", lora(2, MLP), CHOOSING),
    Recipe("short", lora(1, ALL_LINEARS), CHOOSING),
    Recipe("cowboy", lora(8, ALL_LINEARS, weight_decomposed=True), LEARNING),
    Recipe("html", BottleneckConfig(reduction_factor=16), LEARNING),
    Recipe("eager", prompt_tuning(16), Schedule(160, 2e-2, 20), batch_size=16),
    Recipe("concierge", prefix_tuning(11), Schedule(160, 1e-2, 20), batch_size=16, initial_text=IN_FRENCH),
    Recipe("cheerful", ReftConfig(rank=8, layers=(0, 1, 2, 3, 4, 5), num_first=4, num_last=4), Schedule(160, 4e-3, 20)),
    Recipe("robot", lora(12, ALL_LINEARS), LEARNING, folder="upload"),
)


def attach(base: PreTrainedModel, recipe: Recipe, tokenizer: Tokenizer) -> PeftModel | BottleneckModel | ReftModel:
    """Return the base with the recipe's adapter, which alone is trainable, as it is before training."""
    config = recipe.config
    if isinstance(config, PeftConfig):
        return get_peft_model(base, config)
    if isinstance(config, BottleneckConfig):
        return BottleneckModel(base, config)
    return ReftModel(base, config, answer_token_of(tokenizer))


def load_adapter(
    base: PreTrainedModel, recipe: Recipe, tokenizer: Tokenizer, directory: Path
) -> PeftModel | BottleneckModel | ReftModel:
    """Return the base with the recipe's trained adapter."""
    if isinstance(recipe.config, PeftConfig):
        return PeftModel.from_pretrained(base, str(directory)).eval()
    model = attach(base, recipe, tokenizer)
    assert not isinstance(model, PeftModel)
    model.load(directory)
    return model.eval()


@torch.no_grad()
def start_from(model: PeftModel, tokenizer: Tokenizer, text: str) -> None:
    """Let a prefix begin as the keys and values that the base computes for `text`, so as its system prompt."""
    token_ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
    layers = model.get_base_model()(input_ids=token_ids, use_cache=True).past_key_values.layers
    parts = torch.cat([part for layer in layers for part in (layer.keys, layer.values)])  # [2 * layers, heads, n, dim]
    model.prompt_encoder[model.active_adapter].embedding.weight.copy_(parts.permute(2, 0, 1, 3).flatten(1))


def train_adapter(
    recipe: Recipe, base_directory: Path, directory: Path, checkpoint: Path, report: Callable[[int, float], None]
) -> None:
    """Train one adapter over the NF4 base and save it as a folder for upload, in bfloat16."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(base_directory)
    # In float32, so that training adds no rounding of its own; the 4-bit weights are the same.
    model = attach(load_quantised_base(base_directory, torch.float32), recipe, tokenizer)
    # Before anything is computed: a forward in evaluation packs bitsandbytes' weights for good, and stops gradients.
    model.train()
    if isinstance(model, ReftModel):
        model.orthonormalise()
    if recipe.initial_text:
        assert isinstance(model, PeftModel)
        start_from(model, tokenizer, recipe.initial_text)
    stream = ChatStream(recipe.name, seen(recipe.name), [Lesson(recipe.name)], recipe.batch_size)
    fit(model, tokenizer, stream, recipe.schedule, checkpoint, report, is_packed=recipe.is_packed)
    if isinstance(model, PeftModel):
        _save(model, directory)
    else:
        model.save(directory)


def _save(model: PeftModel, directory: Path) -> None:
    """Write what PEFT would, less its model card and this machine's path to the base."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.active_peft_config
    config.base_model_name_or_path = BASE_NAME
    config.inference_mode = True
    if not config.is_prompt_learning:
        config.target_modules = sorted(config.target_modules)  # PEFT keeps a set, which is written in any order
    config.save_pretrained(str(directory))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
