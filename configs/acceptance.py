"""Teachers of the middle size, their hybrids and drafts, to measure acceptance with.

`mil_jax.measure_acceptance` runs all stages and measures; it fills in folders, tokenizer and
the draft's depth. One stage alone:

python -m mil_jax.main --config=configs/acceptance.py:stage=pretrain,world=demo \
    --config.tokenizer=demo_teacher --workdir=build/acceptance/demo/teacher
"""

import dataclasses

import ml_collections

from configs import base, demo_teacher
from mil_jax.config import (
    ComputeConfig,
    ConversionConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    parse_arg,
)
from mil_jax.errors import UserError

# The vocabulary is that of the tokenizer. 76M parameters in the demo world; with 50,000
# tokens, and so 26M parameters in the embedding, 64M.
DEMO = dataclasses.replace(
    demo_teacher.ARCHITECTURE,
    d_model=768,
    layer_types=("attention",) * 12,
    n_heads=12,
    n_kv_heads=4,
    head_dim=64,
    d_ff=2048,
)
ARCHITECTURES = {
    "demo": DEMO,
    "text": dataclasses.replace(
        DEMO,
        vocab_size=50304,
        d_model=512,
        n_heads=8,
        d_ff=1536,
        bos_token_id=None,
        eos_token_ids=(0,),
    ),
}
TINY = {"d_model": 32, "layer_types": ("attention",) * 4, "n_heads": 4}
TINY |= {"n_kv_heads": 2, "head_dim": 16, "d_ff": 48}

# Chats of the demo world are short, so rows are.
ROWS = {
    "demo": {"batch_size": 256, "length": 128},
    "text": {"batch_size": 32, "length": 512},
}
STEPS = {
    "demo": {"pretrain": 400, "distill": 200, "draft": 200},
    "text": {"pretrain": 1200, "distill": 300, "draft": 300},
}
NEW_TOKENS = {"demo": 64, "text": 192}

# `STEPS` ends training, whatever the epochs, and it is too short to need a checkpoint.
TRAINING = {
    "epochs": 1000,
    "packed": True,
    "loss_chunk": 128,
    "checkpoint_every": 100_000,
}
STAGES = {
    stage.name: stage
    for stage in (
        StageConfig(
            name="pretrain",
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=50, weight_decay=0.1),
            loss_on="all",
            **TRAINING,
        ),
        StageConfig(name="pseudo_labels", length=256, temperature=0.8),
        # One stage instead of three: all weights learn, at a rate for small models.
        StageConfig(
            name="distill",
            optimizer=OptimizerConfig(lr=6e-4, warmup_steps=20),
            trainable="all",
            ce_weight=0.1,
            kl_weight=1.0,
            **TRAINING,
        ),
        StageConfig(
            name="draft",
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=20),
            ce_weight=0.1,
            kl_weight=1.0,
            draft_depth=2,
            records="pseudo_labels",
            **TRAINING,
        ),
        StageConfig(name="evaluate", batch_size=256),
    )
}


def get_config(arg: str = "stage=distill") -> ml_collections.ConfigDict:
    """Returns the config of one stage; `tiny` rehearses it on a CPU."""
    args = parse_arg(
        arg, stage="distill", world="demo", mixer="mamba2", attention="50", tiny=False
    )
    world = args["world"]
    if world not in ROWS:
        raise UserError(f"world is {world!r}; this config has {', '.join(ROWS)}")
    stage = base.pick(STAGES, args["stage"])
    architecture, compute = ARCHITECTURES[world], ComputeConfig(dtype="bfloat16")
    sizes = {"max_new_tokens": NEW_TOKENS[world]}
    if stage.name in STEPS[world]:
        sizes |= ROWS[world] | {"max_steps": STEPS[world][stage.name]}
    if stage.name == "pseudo_labels":
        sizes["batch_size"] = 1024
    if args["tiny"]:
        architecture = dataclasses.replace(architecture, **TINY)
        compute = ComputeConfig()
        sizes |= {"batch_size": 4, "max_new_tokens": 16, "max_steps": 2}
    depth = len(architecture.layer_types)
    train, prompts, test = (64, 64, 64) if args["tiny"] else (32768, 12288, 512)
    return base.to_config_dict(
        RunConfig(
            teacher="demo_teacher",
            conversion=ConversionConfig(
                steps=(converted(depth, args["attention"]),), mixer=args["mixer"]
            ),
            data=DataConfig(
                prompts=f"demo:train:0:{prompts}",
                conversations=f"demo:train:0:{train}",
                evaluation=f"demo:test:0:{test}",
            ),
            stage=dataclasses.replace(stage, **sizes),
            compute=compute,
            architecture=architecture if stage.name == "pretrain" else None,
        )
    )


def converted(depth: int, attention: str) -> tuple[int, ...]:
    """Returns the layers that lose their attention: all but every second or fourth."""
    periods = {"50": 2, "25": 4}
    if attention not in periods:
        raise UserError(f"attention is {attention!r}; this config has 50 and 25")
    period = periods[attention]
    return tuple(i for i in range(depth) if i % period != period - 1)
