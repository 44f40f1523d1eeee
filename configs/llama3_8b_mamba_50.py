r"""Llama-3-8B to Mamba, 50% attention.

The paper reports MMLU 59.26, AlpacaEval LC 29.61, MT-Bench 7.35.

python -m mil_jax.main --workdir=... \
    --config=configs/llama3_8b_mamba_50.py:stage=pseudo_labels
... then stage=distill, sft, dpo; stage=draft for speculation; stage=export
"""

import ml_collections

from configs import base
from mil_jax.config import ConversionConfig, RunConfig, parse_arg


def get_config(arg: str = "stage=distill") -> ml_collections.ConfigDict:
    """Returns the config of one stage."""
    args = parse_arg(arg, stage="distill")
    return base.to_config_dict(
        RunConfig(
            teacher="meta-llama/Meta-Llama-3-8B-Instruct",
            # 75% attention, then 50% (Sec. 3, stepwise).
            conversion=ConversionConfig(
                steps=(tuple(range(0, 32, 4)), tuple(range(0, 32, 2))),
                mixer="mamba",
            ),
            data=base.PAPER_DATA,
            stage=base.pick(base.STAGES, args["stage"]),
            compute=base.GPU,
        )
    )
