"""What all configs share: the paper's recipe per stage, and the way to a `ConfigDict`."""

import dataclasses

import ml_collections

from mil_jax.config import (
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
)
from mil_jax.errors import UserError

# On a GPU: bfloat16, frozen weights stored so too, cheap activations recomputed. Layers are
# unrolled: a scan would copy every layer's weights out of their stack.
GPU = ComputeConfig(
    dtype="bfloat16", param_dtype="bfloat16", remat=True, scan_layers=False
)

# UltraChat and UltraFeedback as downloaded files; name your own with
# --config.data.prompts=... and so on.
PAPER_DATA = DataConfig(
    prompts="data/ultrachat_200k.jsonl,data/ultrafeedback_prompts.jsonl",
    conversations="data/sft.jsonl",
    preferences="data/ultrafeedback_binarized.jsonl",
    evaluation="data/eval.jsonl",
)

# Stage 1 (Sec. 3): AdamW betas (0.9, 0.98), 500 warm-up steps, cosine, clip 0.1.
DISTILL = StageConfig(
    name="distill",
    optimizer=OptimizerConfig(lr=8e-5, warmup_steps=500, b2=0.98, clip_norm=0.1),
    batch_size=64,
    accumulate=8,
    length=2048,
    trainable="mamba",
    ce_weight=1.0,
    kl_weight=0.1,
)

# Stage 2: all weights, packed, loss on the answers.
SFT = StageConfig(
    name="sft",
    optimizer=OptimizerConfig(lr=2e-5, warmup_fraction=0.01, b2=0.999),
    batch_size=64,
    accumulate=8,
    length=2048,
    packed=True,
)

# Stage 3 (Eq. 4): the teacher is the reference.
DPO = StageConfig(
    name="dpo",
    optimizer=OptimizerConfig(lr=5e-7, warmup_fraction=0.1, b2=0.999),
    batch_size=64,
    accumulate=8,
    length=1024,
    max_prompt_length=512,
    dpo_beta=0.01,
)

# "Shrink and fine-tune" (Sec. 4.3): the first and the last layer, whatever lies between.
DRAFT = StageConfig(
    name="draft",
    optimizer=OptimizerConfig(lr=1e-4, warmup_fraction=0.03),
    batch_size=64,
    length=2048,
    epochs=3,
    packed=True,
    draft_depth=2,
)

PSEUDO_LABELS = StageConfig(
    name="pseudo_labels", batch_size=64, length=2048, max_new_tokens=1024
)
EXPORT = StageConfig(name="export")
EVALUATE = StageConfig(name="evaluate", batch_size=32, max_new_tokens=512)

STAGES = {
    stage.name: stage
    for stage in (PSEUDO_LABELS, DISTILL, SFT, DPO, DRAFT, EXPORT, EVALUATE)
}


def to_config_dict(config: RunConfig) -> ml_collections.ConfigDict:
    """Returns the config as the flags want it: every field present and typed."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def pick(stages: dict[str, StageConfig], name: str) -> StageConfig:
    """Returns the named stage.

    Raises:
        UserError: The config has no such stage.
    """
    if name not in stages:
        raise UserError(f"unknown stage {name!r}; this config has {', '.join(stages)}")
    return stages[name]
