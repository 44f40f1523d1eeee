"""The demo teacher: a 3.2M-parameter Llama trained on the demo world; minutes on a GPU.

python -m mil_jax.main --config=configs/demo_teacher.py --workdir=build/demo_teacher
python -m mil_jax.main --config=configs/demo_teacher.py:stage=export \
    --workdir=build/demo_teacher
"""

import ml_collections

from configs import base
from mil_jax.config import (
    ComputeConfig,
    ConversionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    parse_arg,
)

ARCHITECTURE = ModelConfig(
    vocab_size=512,
    d_model=192,
    layer_types=("attention",) * 8,
    n_heads=6,
    n_kv_heads=2,
    head_dim=32,
    d_ff=512,
    tie_embeddings=True,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_ids=(5,),
    pad_token_id=0,
)

STAGES = {
    "pretrain": StageConfig(
        name="pretrain",
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=500, weight_decay=0.05),
        batch_size=256,
        length=128,
        epochs=30,
        max_steps=10168,
        packed=True,
        checkpoint_every=2000,
    ),
    "evaluate": StageConfig(name="evaluate", batch_size=256, max_new_tokens=64),
    "export": StageConfig(name="export"),
}


def get_config(arg: str = "stage=pretrain") -> ml_collections.ConfigDict:
    """Returns the config of one stage."""
    args = parse_arg(arg, stage="pretrain")
    return base.to_config_dict(
        RunConfig(
            teacher="",
            tokenizer="demo_teacher",
            conversion=ConversionConfig(steps=()),
            data=DataConfig(
                conversations="demo:train:0:300000", evaluation="demo:test:0:2048"
            ),
            stage=base.pick(STAGES, args["stage"]),
            architecture=ARCHITECTURE,
            compute=ComputeConfig(dtype="float32"),
        )
    )
