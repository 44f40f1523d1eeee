"""The demo world on a CPU: half of the demo teacher's attention becomes Mamba, in minutes.

python -m mil_jax.main --config=configs/demo.py:stage=pseudo_labels --workdir=build/demo
... then stage=distill, sft, dpo, draft, export, evaluate (`make demo` runs them all)
"""

import ml_collections

from configs import base
from mil_jax.config import (
    ConversionConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    parse_arg,
)

STAGES = {
    stage.name: stage
    for stage in (
        StageConfig(
            name="pseudo_labels", batch_size=128, length=128, max_new_tokens=64
        ),
        # The MLPs stay frozen, as in the paper; a small model bears a large rate.
        StageConfig(
            name="distill",
            optimizer=OptimizerConfig(lr=4e-3, warmup_steps=10),
            batch_size=8,
            length=128,
            epochs=8,
            max_steps=200,
            packed=True,
            trainable="not_mlp",
            ce_weight=1.0,
            kl_weight=0.1,
            checkpoint_every=100,
        ),
        StageConfig(
            name="sft",
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=5),
            batch_size=8,
            length=128,
            max_steps=140,
            packed=True,
            checkpoint_every=70,
        ),
        StageConfig(
            name="dpo",
            optimizer=OptimizerConfig(lr=5e-5, warmup_fraction=0.1),
            batch_size=8,
            length=128,
            max_prompt_length=96,
            max_steps=16,
            dpo_beta=0.1,
            checkpoint_every=16,
        ),
        StageConfig(
            name="draft",
            optimizer=OptimizerConfig(lr=2e-3, warmup_steps=10),
            batch_size=16,
            length=128,
            epochs=2,
            max_steps=150,
            packed=True,
            draft_layers=(0,),
            checkpoint_every=150,
        ),
        StageConfig(name="export"),
        StageConfig(name="evaluate", batch_size=64, max_new_tokens=64),
    )
}


def get_config(arg: str = "stage=distill") -> ml_collections.ConfigDict:
    """Returns the config of one stage."""
    args = parse_arg(arg, stage="distill", mixer="mamba")
    return base.to_config_dict(
        RunConfig(
            teacher="demo_teacher",
            # 75% attention, then 50%: stepwise, as the paper does.
            conversion=ConversionConfig(
                steps=((0, 4), (0, 2, 4, 6)), mixer=args["mixer"]
            ),
            data=DataConfig(
                prompts="demo:train:0:2048",
                conversations="demo:train:2048:4000",
                preferences="demo:train:6048:256",
                evaluation="demo:test:0:256",
            ),
            stage=base.pick(STAGES, args["stage"]),
        )
    )
