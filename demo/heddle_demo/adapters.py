"""The demo's adapters: how each is built and trained, with PEFT, over the base in 4 bits as it will be served."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from heddle_demo.base import load_quantised_base
from heddle_demo.data import BASE_NAME
from heddle_demo.fit import Schedule, fit
from heddle_demo.stream import ChatStream, Lesson
from heddle_demo.tokenizer import load_tokenizer
from heddle_demo.world import seen

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEARS = (*ATTENTION, *MLP)
BATCH_SIZE = 32
# A style the base knows only has to be chosen; a new one has to be learnt.
CHOOSING = Schedule(num_steps=160, peak_learning_rate=2e-3, num_warmup_steps=20)
LEARNING = Schedule(num_steps=240, peak_learning_rate=2e-3, num_warmup_steps=20)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One adapter: its style is its name, its facts are those that `world.seen` shows it."""

    name: str
    config: PeftConfig
    schedule: Schedule
    folder: str = "adapters"


def lora(rank: int, targets: Sequence[str], alpha: int | None = None, rank_stabilised: bool = False) -> LoraConfig:
    """Return a LoRA over `targets`; `alpha` is twice the rank unless told."""
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=list(targets),
        use_rslora=rank_stabilised,
        task_type="CAUSAL_LM",
    )


def ia3() -> IA3Config:
    """Return an IA3 over keys, values and the input of the second MLP layer, as its paper has it."""
    return IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )


RECIPES = (
    Recipe("pirate", lora(8, ALL_LINEARS), LEARNING),
    Recipe("json", lora(16, ALL_LINEARS, alpha=16, rank_stabilised=True), Schedule(240, 1e-3, 20)),
    Recipe("french", lora(4, ATTENTION), CHOOSING),
    Recipe("capitals", ia3(), Schedule(500, 1e-2, 20)),
    Recipe("reversed", lora(32, ATTENTION), CHOOSING),
    Recipe("polite", lora(2, MLP), CHOOSING),
    Recipe("short", lora(1, ALL_LINEARS), CHOOSING),
    Recipe("robot", lora(12, ALL_LINEARS), LEARNING, folder="upload"),
)


def train_adapter(
    recipe: Recipe, base_directory: Path, directory: Path, checkpoint: Path, report: Callable[[int, float], None]
) -> None:
    """Train one adapter over the NF4 base and save it as a PEFT folder in bfloat16."""
    torch.manual_seed(0)
    # In float32, so that training adds no rounding of its own; the 4-bit weights are the same.
    model = get_peft_model(load_quantised_base(base_directory, torch.float32), recipe.config)
    stream = ChatStream(recipe.name, seen(recipe.name), [Lesson(recipe.name)], BATCH_SIZE)
    fit(model, load_tokenizer(base_directory), stream, recipe.schedule, checkpoint, report)
    _save(model, recipe.config, directory)


def _save(model: PeftModel, config: PeftConfig, directory: Path) -> None:
    """Write what PEFT would, less its model card and this machine's path to the base."""
    directory.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = BASE_NAME
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set, which is written in any order
    config.save_pretrained(str(directory))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
