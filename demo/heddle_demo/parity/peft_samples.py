"""One random adapter of every method that PEFT computes and heddle serves."""

from __future__ import annotations

from typing import Any

from peft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PeanutConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PveraConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

from heddle_demo.parity.peft_sample import PeftSample

QV = ["q_proj", "v_proj"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASK = "CAUSAL_LM"
NUM_VIRTUAL_TOKENS = 20  # one page and a beginning
INVOCATION = [5, 9]
TRAINED_TOKENS = [3, 17, 42, 64]


def lora(**changes: Any) -> PeftConfig:
    """On all linears, unless told otherwise."""
    options = {"r": 8, "lora_alpha": 16, "target_modules": LINEARS, "task_type": TASK, **changes}
    return LoraConfig(**options)


def _virtual(base: Any, kind: Any, **changes: Any) -> PeftConfig:
    """Virtual tokens for a model; PEFT asks for its sizes."""
    config = base.config
    virtual: PeftConfig = kind(
        task_type=TASK,
        num_virtual_tokens=NUM_VIRTUAL_TOKENS,
        token_dim=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        **changes,
    )
    return virtual


def prefix_tuning(base: Any) -> PeftConfig:
    """Without a projection."""
    return _virtual(base, PrefixTuningConfig)


LOW_RANK = (
    PeftSample("LoRA", lambda base: lora()),
    PeftSample("LoRA, rank 64", lambda base: lora(r=64, lora_alpha=64, target_modules=QV)),
    PeftSample("rsLoRA", lambda base: lora(use_rslora=True)),
    PeftSample(
        "LoRA, rank and alpha patterns",
        lambda base: lora(rank_pattern={"q_proj": 3, "layers.0.mlp.up_proj": 11}, alpha_pattern={"v_proj": 5}),
    ),
    PeftSample("LoRA with bias of B", lambda base: lora(lora_bias=True)),
    PeftSample("LoRA, bias='all'", lambda base: lora(bias="all")),
    PeftSample("LoRA on the output head", lambda base: lora(target_modules=[*QV, "lm_head"])),
    PeftSample("LoRA on the embedding", lambda base: lora(target_modules=[*QV, "embed_tokens"])),
    PeftSample("LoRA with norms (LongLoRA)", lambda base: lora(modules_to_save=["norm", "input_layernorm"])),
    PeftSample("LoRA with trained tokens", lambda base: lora(trainable_token_indices=TRAINED_TOKENS)),
    PeftSample("DoRA", lambda base: lora(use_dora=True)),
    PeftSample(
        "AdaLoRA",
        lambda base: AdaLoraConfig(
            init_r=6, target_r=4, lora_alpha=16, total_step=10, target_modules=LINEARS, task_type=TASK
        ),
        zero_size=20.0,
    ),
    PeftSample(
        "PiSSA, as trained", lambda base: lora(init_lora_weights="pissa", target_modules=QV), on_plain_base_only=True
    ),
    PeftSample("PiSSA, converted", lambda base: lora(init_lora_weights="pissa", target_modules=QV), converts=True),
    PeftSample(
        "OLoRA, as trained", lambda base: lora(init_lora_weights="olora", target_modules=QV), on_plain_base_only=True
    ),
    PeftSample("aLoRA", lambda base: lora(alora_invocation_tokens=INVOCATION)),
)
OTHER_LOW_RANK = (
    PeftSample("VeRA", lambda base: VeraConfig(r=16, target_modules=QV, task_type=TASK), zero_size=2.0),
    PeftSample("PVeRA", lambda base: PveraConfig(r=16, target_modules=QV, task_type=TASK), zero_size=2.0),
    PeftSample(
        "VB-LoRA",
        lambda base: VBLoRAConfig(
            r=4, num_vectors=16, vector_length=16, topk=2, init_vector_bank_bound=0.5, target_modules=QV, task_type=TASK
        ),
    ),
    PeftSample("TinyLoRA", lambda base: TinyLoraConfig(target_modules=QV, task_type=TASK)),
    PeftSample("LoHa", lambda base: LoHaConfig(r=4, alpha=8, target_modules=LINEARS, task_type=TASK)),
    PeftSample("LoKr", lambda base: LoKrConfig(r=4, alpha=8, target_modules=LINEARS, task_type=TASK)),
    PeftSample("MiSS", lambda base: MissConfig(r=8, target_modules=LINEARS, task_type=TASK)),
    PeftSample("HRA", lambda base: HRAConfig(r=8, target_modules=LINEARS, task_type=TASK)),
    PeftSample("DeLoRA", lambda base: DeloraConfig(r=8, target_modules=LINEARS, task_type=TASK)),
    PeftSample("GraLoRA", lambda base: GraloraConfig(r=8, target_modules=QV, task_type=TASK)),
    PeftSample("PEANuT", lambda base: PeanutConfig(r=8, target_modules=QV, task_type=TASK)),
    PeftSample("DEFT", lambda base: DeftConfig(r=4, target_modules=QV, task_type=TASK), noise=6.0),
    PeftSample(
        "Uni-LoRA",
        lambda base: UniLoraConfig(r=4, theta_d_length=256, init_theta_d_bound=3.0, target_modules=QV, task_type=TASK),
    ),
)
VECTORS = (
    PeftSample(
        "IA3",
        lambda base: IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type=TASK
        ),
    ),
    PeftSample("LN tuning", lambda base: LNTuningConfig(task_type=TASK)),
    PeftSample("BEFT", lambda base: BeftConfig(target_modules=["v_proj"], task_type=TASK)),
    PeftSample(
        "trainable tokens",
        lambda base: TrainableTokensConfig(
            token_indices=TRAINED_TOKENS, target_modules=["embed_tokens"], task_type=TASK
        ),
        noise=1.0,
    ),
)
VIRTUAL = (
    PeftSample("prompt tuning", lambda base: _virtual(base, PromptTuningConfig)),
    PeftSample("P-tuning", lambda base: _virtual(base, PromptEncoderConfig, encoder_hidden_size=32)),
    PeftSample(
        "multitask prompt tuning",
        lambda base: _virtual(base, MultitaskPromptTuningConfig, num_tasks=1),
        inputs={"task_ids": 0},
    ),
    PeftSample("prefix tuning", prefix_tuning),
    PeftSample(
        "P-tuning v2", lambda base: _virtual(base, PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=32)
    ),
)
DENSE = (
    PeftSample("Super-Tuning", lambda base: SupertuningConfig(sparsity=0.9, target_modules=QV, task_type=TASK)),
    PeftSample("SHiRA", lambda base: ShiraConfig(r=4, target_modules=QV, task_type=TASK)),
    PeftSample("RoAD", lambda base: RoadConfig(target_modules=QV, group_size=32, task_type=TASK)),
    PeftSample("OFT", lambda base: OFTConfig(oft_block_size=16, r=0, target_modules=QV, task_type=TASK)),
    PeftSample("BOFT", lambda base: BOFTConfig(boft_block_size=16, target_modules=QV, task_type=TASK)),
    PeftSample("HiRA", lambda base: HiraConfig(r=8, target_modules=QV, task_type=TASK), zero_size=4.0),
    PeftSample(
        "FourierFT", lambda base: FourierFTConfig(n_frequency=50, scaling=100.0, target_modules=QV, task_type=TASK)
    ),
    PeftSample("C3A", lambda base: C3AConfig(block_size=16, target_modules=QV, task_type=TASK), noise=30.0),
    PeftSample("LoRA with the output head", lambda base: lora(target_modules=QV, modules_to_save=["lm_head"])),
)
PEFT_SAMPLES = (*LOW_RANK, *OTHER_LOW_RANK, *VECTORS, *VIRTUAL, *DENSE)
