"""From a local model directory to a model on its device: quantised on load, attention routed to pages, rope fixed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.logging import disable_progress_bar

from heddle_adapters.base_layout import KvLayout
from heddle_server.config import ConfigError, EngineConfig
from heddle_server.engine.attention import ATTENTION_NAME, register_attention
from heddle_server.engine.dummy_weights import SEED, make_dummy_model
from heddle_server.engine.places import Places
from heddle_server.engine.probe import probe

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAMPLE_BYTES = 1 << 16  # of each sample that the fingerprint takes of a weights file
NUM_SAMPLES = 64  # per weights file; a smaller file is hashed whole


@dataclass(frozen=True)
class LoadedModel:
    """A base ready to be woven."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    quantization: str  # "nf4", "fp4", "int8", "none", or what a quantised checkpoint came with
    fingerprint: str  # "sha256:<hex>", or "dummy:<hex>"
    kv_layout: KvLayout
    shared_inputs: tuple[tuple[str, ...], ...]  # paths of linears that read the same tensor, as `probe` found them
    places: Places  # what adapters may change beside linears
    eos_token_ids: tuple[int, ...]
    context_length: int  # the model's own limit
    weights_bytes: int
    quantized_bytes: int  # of weights_bytes, what is held quantised


def load_model(config: EngineConfig) -> LoadedModel:
    """Load and quantise. Raises ConfigError when this base cannot be served as asked."""
    path = Path(config.model_path)
    model_config = AutoConfig.from_pretrained(path, local_files_only=True)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, model_config)
    register_attention()
    disable_progress_bar()
    is_dummy = config.load_format == "dummy"
    if is_dummy:
        logger.warning("the base's weights are random (--load-format dummy): its answers are noise")
        model_config.quantization_config = None  # quantised as asked, whatever the real checkpoint is
        model = make_dummy_model(model_config, quantization_of(config, dtype), dtype, device, ATTENTION_NAME)
    else:
        own_quantization = own_quantization_name(model_config)
        warn_of_another_quantization(config.quantization, own_quantization)
        model = load_weights(
            path,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            device_map={"": device},
            quantization=None if own_quantization else quantization_of(config, dtype),
        )
    model.eval()
    model.requires_grad_(False)
    context_length = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    fix_rope(model, min(config.max_model_len or context_length, context_length))
    choose_4bit_path(model, dtype)
    quantise_rows_alone(model)
    quantization = own_quantization_name(model.config) or "none"
    probed = probe(model)
    weights_bytes, quantized_bytes = measure_weights(model)
    return LoadedModel(
        model=model,
        device=device,
        dtype=dtype,
        quantization=quantization,
        fingerprint=fingerprint(path, quantization) if not is_dummy else dummy_fingerprint(path, quantization),
        kv_layout=probed.kv_layout,
        shared_inputs=probed.shared_inputs,
        places=probed.places,
        eos_token_ids=eos_token_ids(path, model),
        context_length=context_length,
        weights_bytes=weights_bytes,
        quantized_bytes=quantized_bytes,
    )


def choose_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked for, but torch finds no CUDA device. Use --device cpu or auto.")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if wanted == "cuda" else torch.device("cpu")


def choose_dtype(wanted: str, model_config: Any) -> torch.dtype:
    own: torch.dtype = model_config.get_text_config().dtype or model_config.dtype or torch.float32
    if wanted == "auto":
        return own
    if wanted == "float16" and own == torch.bfloat16:
        logger.warning(
            "the checkpoint is bfloat16 and is served as float16: values beyond 65,504 become infinite; "
            "--dtype auto keeps the checkpoint's own type"
        )
    return DTYPES[wanted]


def load_weights(path: Path, quantization: BitsAndBytesConfig | None, **options: Any) -> PreTrainedModel:
    """The model with every weight from its checkpoint: transformers alone would fill gaps with random numbers.

    Raises ConfigError when it cannot be loaded this way, or not wholly.
    """
    if quantization is not None:  # None itself would strip a quantised checkpoint of its own
        options["quantization_config"] = quantization
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, output_loading_info=True, **options
        )
    except ValueError as error:  # transformers' own words for a model it cannot load this way
        raise ConfigError(f"{path} cannot be loaded as a causal language model: {error}") from error
    except OSError as error:  # the same, for one without weights, or with files that cannot be read
        raise ConfigError(
            f"{path} has no weights that can be loaded: {error}. --load-format dummy makes random ones, for measuring."
        ) from error
    absent = [*report["missing_keys"], *(str(entry) for entry in report["mismatched_keys"])]
    if absent:
        raise ConfigError(
            f"{path} lacks {len(absent)} of the weights that {type(model).__name__} needs, or has them in another "
            f"shape: {', '.join(absent[:5])}. The checkpoint is incomplete or belongs to another architecture."
        )
    return model


def quantization_of(config: EngineConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How plain weights are to be quantised on load; None for not at all."""
    if config.quantization == "none":
        return None
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def own_quantization_name(model_config: Any) -> str | None:
    """What a checkpoint's, or a loaded model's, weights are quantised to; None for not at all."""
    quantization = getattr(model_config, "quantization_config", None)
    if quantization is None:
        return None
    described = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if described.get("load_in_8bit"):
        return "int8"
    return str(described.get("bnb_4bit_quant_type") or described.get("quant_method"))


def warn_of_another_quantization(wanted: str, own: str | None) -> None:
    """Where --quantization cannot be obeyed. "nf4" is also what nobody asked for, so of that nothing is said."""
    if own is not None and wanted not in (own, "nf4"):
        logger.warning(
            "the checkpoint is quantised to %s already and is served as it is; --quantization %s is ignored: "
            "it needs the unquantised checkpoint",
            own,
            wanted,
        )


def fix_rope(model: nn.Module, max_model_len: int) -> None:
    """Make rotary frequencies a constant of the server: nothing may depend on the longest sequence in the batch.

    transformers chooses longrope's short or long factors by the longest position of each forward; here the longest
    context the server admits decides, once. `dynamic` scaling changes with the sequence and is refused.
    """
    module: Any
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, dict):
            kinds = set(rope_type.values())
        else:
            kinds = {rope_type} if isinstance(rope_type, str) else set()
        if any("dynamic" in kind for kind in kinds) or (isinstance(rope_type, dict) and "longrope" in kinds):
            raise ConfigError(
                f"this model's rope scaling ({', '.join(sorted(kinds))}) depends on the longest sequence of a batch: "
                "one request would change another's answer. Set a fixed rope type (yarn, linear, llama3) in "
                "its config.json."
            )
        if rope_type == "longrope":
            parameters = module.config.rope_parameters
            original_length = parameters["original_max_position_embeddings"]
            chosen_length = max_model_len if max_model_len > original_length else original_length
            frequencies, scaling = ROPE_INIT_FUNCTIONS["longrope"](
                module.config, module.inv_freq.device, seq_len=chosen_length
            )
            module.inv_freq.copy_(frequencies)
            module.attention_scaling = scaling
            module.rope_type = "default"  # the per-forward choice looks at this name


def choose_4bit_path(model: nn.Module, dtype: torch.dtype) -> None:
    """Where bitsandbytes' fused CPU path cannot be used: it rounds block scales to bf16 and wants whole blocks.

    In float32 the 4-bit weights' exact values are served; a layer whose input is no multiple of 64 wide is unpacked.
    """
    module: Any
    for module in model.modules():
        if not isinstance(module, Linear4bit):
            continue
        if dtype == torch.float32:
            module.weight.quant_state.dtype = torch.float32
        if dtype == torch.float32 or module.in_features % 64 or module.out_features % 32:
            module.support_avx512bf16_for_cpu = False


def quantise_rows_alone(model: nn.Module) -> None:
    """Make int8 activations a matter of their own row.

    Above a threshold, LLM.int8 computes a whole column of the batch in 16 bit for the sake of one row's outlier: one
    request would change another's answer. Quantised checkpoints come with such a threshold.
    """
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.state.threshold = 0.0


def eos_token_ids(path: Path, model: PreTrainedModel) -> tuple[int, ...]:
    """Every id that ends an answer, from generation_config.json, else from the model's config."""
    has_file = (path / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(path, local_files_only=True) if has_file else model.generation_config
    eos = generation.eos_token_id if generation.eos_token_id is not None else model.config.eos_token_id
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)


def measure_weights(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of all weights, and of those that are held quantised, their scales included."""
    total = quantized = 0
    for parameter in model.parameters():
        size = parameter.nbytes + (scales := scale_bytes(parameter))
        total += size
        quantized += size if scales else 0
    for module in model.modules():  # what our own layers hold beside their parameters
        quantized += (size := int(getattr(module, "quantized_bytes", 0)))
        total += size + int(getattr(module, "dense_bytes", 0))
    return total, quantized


def scale_bytes(parameter: Any) -> int:
    """Of the scales that belong to a quantised weight; 0 for any other."""
    if parameter.dtype == torch.int8:
        return int(4 * parameter.shape[0])  # one float32 a row
    if (quant_state := getattr(parameter, "quant_state", None)) is None:
        return 0
    nested = getattr(quant_state, "state2", None)  # gone once the fused CPU path has repacked the weight
    return int(quant_state.absmax.nbytes + (nested.absmax.nbytes if nested is not None else 0))


def fingerprint(path: Path, quantization: str) -> str:
    """sha256 over the weights files and the quantisation, so that an adapter can name the base it was trained on.

    Of a large file the header, the size and evenly spaced samples are read: fine-tuning changes every tensor, so a
    sample of each region tells two bases apart without reading gigabytes.
    """
    digest = hashlib.sha256(json.dumps({"format": 1, "quantization": quantization}).encode())
    for file in sorted(path.glob("*.safetensors")):
        size_bytes = file.stat().st_size
        digest.update(f"{file.name}:{size_bytes}:".encode())
        with file.open("rb") as stream:
            step_bytes = max(SAMPLE_BYTES, math.ceil(size_bytes / NUM_SAMPLES))
            for begin in range(0, size_bytes, step_bytes):
                stream.seek(begin)
                digest.update(stream.read(SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()}"


def dummy_fingerprint(path: Path, quantization: str) -> str:
    """Of random weights: the shapes, the seed and the quantisation. No real base has it."""
    described = {"format": 1, "quantization": quantization, "seed": SEED}
    digest = hashlib.sha256(json.dumps(described).encode())
    digest.update((path / "config.json").read_bytes())
    return f"dummy:{digest.hexdigest()}"
