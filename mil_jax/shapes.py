"""Architectures of well-known models, for benchmarks and tests with random weights."""

import dataclasses

from mil_jax.config import ModelConfig, RopeScaling, SSMConfig
from mil_jax.errors import UserError


def _attention(n_layers: int, **kwargs: object) -> ModelConfig:
    return ModelConfig(layer_types=("attention",) * n_layers, **kwargs)


_LLAMA3_1_ROPE = RopeScaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
_LLAMA3_8B = {
    "n_layers": 32,
    "vocab_size": 128256,
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 128,
    "d_ff": 14336,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_ids": (128001, 128009),
}

SHAPES: dict[str, ModelConfig] = {
    "llama3_8b": _attention(**_LLAMA3_8B),
    "llama3_1_8b": _attention(
        **_LLAMA3_8B, rope_scaling=_LLAMA3_1_ROPE, max_position_embeddings=131072
    ),
    "llama3_2_1b": _attention(
        16,
        vocab_size=128256,
        d_model=2048,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        d_ff=8192,
        rope_theta=500000.0,
        tie_embeddings=True,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    ),
    "zephyr_7b": _attention(
        32,
        vocab_size=32000,
        d_model=4096,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=14336,
        sliding_window=4096,
        max_position_embeddings=32768,
        model_type="mistral",
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
    "tiny": _attention(
        4,
        vocab_size=512,
        d_model=64,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        d_ff=128,
        eos_token_ids=(5,),
    ),
    "mamba_2_8b": ModelConfig(
        vocab_size=50280,
        d_model=2560,
        layer_types=("mamba",) * 64,
        ssm=SSMConfig(
            d_state=16, dt_rank=160, d_inner=5120, d_xb=5120, inputs_from="conv"
        ),
        tie_embeddings=True,
        model_type="mamba",
        eos_token_ids=(0,),
    ),
    "mamba_130m": ModelConfig(
        vocab_size=50280,
        d_model=768,
        layer_types=("mamba",) * 24,
        ssm=SSMConfig(
            d_state=16, dt_rank=48, d_inner=1536, d_xb=1536, inputs_from="conv"
        ),
        tie_embeddings=True,
        model_type="mamba",
        eos_token_ids=(0,),
    ),
}


def hybrid(config: ModelConfig, mixer: str, attention: float) -> ModelConfig:
    """Returns the architecture with Mamba layers that its conversion gives.

    Args:
        config: Of a transformer.
        mixer: "mamba" or "mamba2".
        attention: Share of the layers that stay attention, evenly spaced: 1 / n or 0 or 1.

    Raises:
        UserError: The share is none of those.
    """
    every = round(1 / attention) if attention else config.n_layers + 1
    if not 0 <= attention <= 1 or (attention and abs(1 / attention - every) > 1e-3):
        raise UserError(
            f"attention is {attention}; take 0, 1, 0.5, 0.25 or another 1 / n"
        )
    heads, kv_heads = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
    ssm = SSMConfig(
        d_state=config.head_dim if mixer == "mamba2" else 16,
        dt_rank=-(-config.d_model // 16),
        d_inner=heads,
        d_xb=kv_heads,
    )
    kinds = tuple(
        "attention" if i % every == every - 1 else mixer for i in range(config.n_layers)
    )
    is_mixed = set(kinds) != {"attention"}
    return dataclasses.replace(
        config, layer_types=kinds, ssm=ssm if is_mixed else config.ssm
    )


def keep(config: ModelConfig, n_layers: int) -> ModelConfig:
    """Returns the architecture with its first layers only: a draft's."""
    kinds = config.layer_types[:n_layers]
    return dataclasses.replace(config, layer_types=kinds)
