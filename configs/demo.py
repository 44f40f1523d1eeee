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
        # A small model bears a large rate.
        StageConfig(
            name="distill",
            optimizer=OptimizerConfig(lr=4e-3, warmup_steps=10),
            batch_size=8,
            length=128,
            epochs=8,
            max_steps=170,
            packed=True,
            trainable="mamba",
            ce_weight=1.0,
            kl_weight=0.1,
            checkpoint_every=85,
        ),
        StageConfig(
            name="sft",
            optimizer=OptimizerConfig(lr=2e-4, warmup_steps=5),
            batch_size=8,
            length=128,
            max_steps=60,
            packed=True,
            checkpoint_every=60,
        ),
        StageConfig(
            name="dpo",
            optimizer=OptimizerConfig(lr=5e-5, warmup_fraction=0.1),
            batch_size=8,
            length=128,
            max_prompt_length=96,
            max_steps=10,
            dpo_beta=0.1,
            checkpoint_every=10,
        ),
        StageConfig(
            name="draft",
            optimizer=OptimizerConfig(lr=2e-3, warmup_steps=10),
            batch_size=8,
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
            # 75% attention, then 50%: stepwise, as the paper does. The upper layers are those
            # that this teacher can spare best (python -m mil_jax.probe_layers).
            conversion=ConversionConfig(
                steps=((4, 6), (4, 5, 6, 7)), mixer=args["mixer"]
            ),
            data=DataConfig(
                prompts="demo:train:0:3072",
                conversations="demo:train:3072:4000",
                preferences="demo:train:7072:256",
                evaluation="demo:test:0:256",
            ),
            stage=base.pick(STAGES, args["stage"]),
        )
    )
