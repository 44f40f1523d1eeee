"""Every stage of the demo in at most two steps: rehearses commands, tests and notebooks.

python -m mil_jax.bench_train --config=configs/tiny.py:stage=distill --shape=tiny
"""

import dataclasses

import ml_collections

from configs import base, demo
from mil_jax.config import ConversionConfig, DataConfig, RunConfig, parse_arg


def get_config(arg: str = "stage=distill") -> ml_collections.ConfigDict:
    """Returns the config of one stage, at most two steps long."""
    args = parse_arg(arg, stage="distill", mixer="mamba")
    stage = base.pick(demo.STAGES, args["stage"])
    small = {"batch_size": 4, "max_steps": 2, "max_new_tokens": 8}
    return base.to_config_dict(
        RunConfig(
            teacher="demo_teacher",
            conversion=ConversionConfig(steps=((0,), (0, 2)), mixer=args["mixer"]),
            data=DataConfig(
                prompts="demo:train:0:16",
                conversations="demo:train:16:16",
                preferences="demo:train:32:16",
                evaluation="demo:test:0:8",
            ),
            stage=dataclasses.replace(stage, **small),
        )
    )
