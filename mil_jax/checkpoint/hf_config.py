"""Config files of released checkpoints to `ModelConfig` and back.

Read: `config.json` of the Llama family (as transformers 4 and 5 write it), of
state-spaces Mamba and of its transformers form; `mamba_config.json` of the hybrids;
`generation_config.json`. Written: what transformers 4 and 5 and the hybrids' own loader
accept.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from mil_jax.config import LayerType, ModelConfig, RopeScaling, SSMConfig
from mil_jax.errors import UserError

Json = Mapping[str, Any]

# What a model type's attention always or never has: (q/k/v bias, q/k norm).
_TRAITS = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers assumes for a key that config.json leaves out.
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_WINDOW = {"mistral": 4096}
SUPPORTED = (
    f"{', '.join(_TRAITS)} (attention), hybrids of these with a mamba_config.json, and "
    "pure Mamba (state-spaces or transformers format)"
)
_REQUIRED = object()


def _get(
    values: Json,
    key: str,
    kind: type,
    default: Any = _REQUIRED,
    file: str = "config.json",
) -> Any:
    """Returns `values[key]`, checked; null counts as left out."""
    value = values.get(key)
    if value is None:
        if default is _REQUIRED:
            raise UserError(f"{file} has no {key!r}; the file is incomplete")
        return default
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(
            f"{file}: {key!r} is {value!r}; expected a value of type {kind.__name__}"
        )
    return value


def _require(values: Json, file: str, **expected: Any) -> None:
    """Refuses a key whose value changes the computation in a way we do not have."""
    for key, value in expected.items():
        if values.get(key) is not None and values[key] != value:
            raise UserError(
                f"{file}: {key!r} is {values[key]!r}; only {value!r} is supported"
            )


def is_state_spaces(hf: Json) -> bool:
    """Whether a config.json describes a pure Mamba model."""
    return hf.get("model_type") == "mamba" or ("d_model" in hf and "n_layer" in hf)


def attention_config(hf: Json, generation: Json) -> ModelConfig:
    """Returns the config of an all-attention model.

    Args:
        hf: Content of config.json.
        generation: Content of generation_config.json, or {}; its token ids win.
    """
    model_type = hf.get("model_type")
    if model_type not in _TRAITS:
        named = model_type or hf.get("architectures") or "an unnamed architecture"
        raise UserError(
            f"config.json describes {named!r}, which is not supported; supported: "
            f"{SUPPORTED}"
        )
    if hf.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config; quantized weights are not "
            "supported, dequantize the checkpoint first"
        )
    _require(hf, "config.json", hidden_act="silu", mlp_bias=False)
    if model_type != "qwen2":
        # There it would also put a bias on the output projection.
        _require(hf, "config.json", attention_bias=False)
    attention_bias, qk_norm = _TRAITS[model_type]
    n_layers = _get(hf, "num_hidden_layers", int)
    d_model = _get(hf, "hidden_size", int)
    n_heads = _get(hf, "num_attention_heads", int)
    n_kv_heads = n_heads if model_type == "llama" else _REQUIRED
    head_dim = _DEFAULT_HEAD_DIM.get(model_type, d_model // n_heads)
    rope_theta, rope_scaling = _rope(hf)
    return ModelConfig(
        vocab_size=_get(hf, "vocab_size", int),
        d_model=d_model,
        layer_types=("attention",) * n_layers,
        n_heads=n_heads,
        n_kv_heads=_get(hf, "num_key_value_heads", int, n_kv_heads),
        head_dim=_get(hf, "head_dim", int, head_dim),
        d_ff=_get(hf, "intermediate_size", int),
        rms_norm_eps=_get(hf, "rms_norm_eps", float, 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=_sliding_window(hf, model_type, n_layers),
        tie_embeddings=_get(hf, "tie_word_embeddings", bool, False),
        attention_bias=attention_bias,
        qk_norm=qk_norm,
        max_position_embeddings=_get(
            hf, "max_position_embeddings", int, _DEFAULT_POSITIONS[model_type]
        ),
        model_type=model_type,
        **_token_ids(hf, generation),
    )


def _rope(hf: Json) -> tuple[float, RopeScaling | None]:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    scaling = _get(hf, "rope_parameters", dict, None)
    if scaling is None:
        scaling = _get(hf, "rope_scaling", dict, {})
    theta = _get(scaling, "rope_theta", float, None)
    if theta is None:
        theta = _get(hf, "rope_theta", float, 10000.0)
    for place in (hf, scaling):
        _require(place, "config.json", partial_rotary_factor=1.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"config.json: rope scaling of type {kind!r} is not supported; supported: "
            "none, 'default' and 'llama3'"
        )
    return theta, RopeScaling(
        factor=_get(scaling, "factor", float),
        low_freq_factor=_get(scaling, "low_freq_factor", float),
        high_freq_factor=_get(scaling, "high_freq_factor", float),
        original_max_position_embeddings=_get(
            scaling, "original_max_position_embeddings", int
        ),
    )


def _sliding_window(hf: Json, model_type: str, n_layers: int) -> int | None:
    """Returns the window that all layers share, or None; a mixture is refused."""
    if model_type == "llama":
        return None
    if "sliding_window" in hf:
        window = _get(hf, "sliding_window", int, None)
    else:
        window = _DEFAULT_WINDOW.get(model_type)
    if model_type == "mistral" or window is None:
        return window
    if not _get(hf, "use_sliding_window", bool, False):
        return None
    # Qwen: layers from `max_window_layers` on have it, unless they are listed singly.
    first = _get(hf, "max_window_layers", int, n_layers)
    by_rule = ["full_attention"] * min(first, n_layers)
    by_rule += ["sliding_attention"] * (n_layers - len(by_rule))
    kinds = set(_get(hf, "layer_types", list, by_rule))
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"}:
        return window
    raise UserError(
        f"config.json: attention layers of kinds {sorted(kinds)} in one model are not "
        "supported; all must be full or all must have the sliding window"
    )


def _token_ids(hf: Json, generation: Json) -> dict[str, Any]:
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = hf.get("eos_token_id")
    bos, pad = (
        hf[key] if hf.get(key) is not None else generation.get(key)
        for key in ("bos_token_id", "pad_token_id")
    )
    if eos is None:
        eos = ()
    elif not isinstance(eos, list):
        eos = (eos,)
    return {"bos_token_id": bos, "eos_token_ids": tuple(eos), "pad_token_id": pad}


_MAMBA_CONFIG = "mamba_config.json"
_MAMBA_CONFIG_KEYS = (
    "d_model",
    "ssm_cfg",
    "rms_norm_eps",
    "vocab_size",
    "d_inner",
    "d_xb",
    "intermediate_size",
    "hidden_act",
    "n_layer",
    "attn_layers",
)
# Constructor arguments that only matter at initialisation or for speed.
_NEUTRAL_SSM_CFG = frozenset(
    "dt_min dt_max dt_init dt_scale dt_init_floor A_init_range conv_init use_fast_path "
    "chunk_size use_mem_eff_path headdim sequence_parallel".split()
)
_FIXED_SSM_CFG = {
    "mamba": {
        "conv_bias": True,
        "proj_x_bias": False,
        "proj_z_bias": False,
        "out_proj_bias": False,
        "repeat_kv_before_conv": True,
    },
    "mamba2": {
        "conv_bias": True,
        "bias": False,
        "rmsnorm": True,
        "norm_before_gate": False,
        "D_has_hdim": False,
        "repeat_kv_before_conv": False,
    },
}
_READ_SSM_CFG = frozenset(("d_state", "d_conv", "dt_rank", "expand", "ngroups"))


def hybrid_kind(mamba: Json, keys: Iterable[str]) -> LayerType:
    """Returns "mamba" or "mamba2", from the tensors' names or else from the config."""
    kinds: set[LayerType] = set()
    for key in keys:
        if key.endswith(".mamba.in_proj_x.weight"):
            kinds.add("mamba")
        elif key.endswith(".mamba.in_proj.weight"):
            kinds.add("mamba2")
    if len(kinds) == 2:
        raise UserError(
            "the checkpoint has both Mamba and Mamba-2 layers; one kind per model is "
            "supported"
        )
    if kinds:
        return kinds.pop()
    return "mamba2" if "ngroups" in (mamba.get("ssm_cfg") or {}) else "mamba"


def hybrid_config(base: ModelConfig, mamba: Json, kind: LayerType) -> ModelConfig:
    """Returns a hybrid's config.

    Args:
        base: The teacher's config, from the config.json beside it.
        mamba: Content of mamba_config.json.
        kind: Mixer of the layers that are not attention.
    """
    for key in mamba:
        if key not in _MAMBA_CONFIG_KEYS:
            raise UserError(
                f"mamba_config.json: unknown key {key!r}; known: "
                f"{', '.join(_MAMBA_CONFIG_KEYS)}"
            )
    _require(
        mamba,
        "mamba_config.json",
        d_model=base.d_model,
        n_layer=base.n_layers,
        rms_norm_eps=base.rms_norm_eps,
        vocab_size=base.vocab_size,
        intermediate_size=base.d_ff,
        hidden_act="silu",
    )
    attn_layers = mamba.get("attn_layers")
    if not isinstance(attn_layers, list) or not set(attn_layers) <= set(
        range(base.n_layers)
    ):
        raise UserError(
            f"mamba_config.json: 'attn_layers' is {attn_layers!r}; expected a list of "
            f"layers from 0 to {base.n_layers - 1}"
        )
    return dataclasses.replace(
        base,
        layer_types=tuple(
            "attention" if i in attn_layers else kind for i in range(base.n_layers)
        ),
        ssm=_hybrid_ssm(base, mamba, kind),
    )


def _hybrid_ssm(base: ModelConfig, mamba: Json, kind: LayerType) -> SSMConfig:
    ssm_cfg = _get(mamba, "ssm_cfg", dict, {}, _MAMBA_CONFIG)
    fixed = _FIXED_SSM_CFG[kind]
    for key in ssm_cfg:
        if key not in _READ_SSM_CFG | _NEUTRAL_SSM_CFG | set(fixed):
            raise UserError(f"mamba_config.json: unknown key {key!r} in ssm_cfg")
    _require(ssm_cfg, "mamba_config.json, ssm_cfg", **fixed)
    expanded = _get(ssm_cfg, "expand", int, 2, _MAMBA_CONFIG) * base.d_model
    d_inner = _get(mamba, "d_inner", int, expanded, _MAMBA_CONFIG)
    d_state = 16 if kind == "mamba" else 128
    d_state = _get(ssm_cfg, "d_state", int, d_state, _MAMBA_CONFIG)
    if kind == "mamba2" and (
        ssm_cfg.get("ngroups") != base.n_heads or d_inner != base.n_heads * d_state
    ):
        raise UserError(
            f"mamba_config.json: Mamba-2 layers with d_inner {d_inner}, ngroups "
            f"{ssm_cfg.get('ngroups')} and d_state {d_state} are not supported; "
            f"ngroups must be the number of heads ({base.n_heads}) and d_inner be "
            "ngroups * d_state"
        )
    return SSMConfig(
        d_state=d_state,
        dt_rank=_dt_rank(ssm_cfg.get("dt_rank"), base.d_model),
        d_inner=d_inner,
        d_xb=_get(mamba, "d_xb", int, file=_MAMBA_CONFIG),
        d_conv=_get(ssm_cfg, "d_conv", int, 4, _MAMBA_CONFIG),
    )


def _dt_rank(value: int | str | None, d_model: int) -> int:
    return math.ceil(d_model / 16) if value in (None, "auto") else int(value)


def state_spaces_config(hf: Json, generation: Json) -> ModelConfig:
    """Returns the config of a pure Mamba model, in either published form."""
    if hf.get("model_type") == "mamba":
        return _transformers_mamba_config(hf, generation)
    ssm_cfg = _get(hf, "ssm_cfg", dict, {})
    _require(hf, "config.json", rms_norm=True, d_intermediate=0, attn_layer_idx=[])
    fixed = {"layer": "Mamba1", "conv_bias": True, "bias": False}
    for key in ssm_cfg:
        if key not in _READ_SSM_CFG | _NEUTRAL_SSM_CFG | set(fixed):
            raise UserError(f"config.json: unknown key {key!r} in ssm_cfg")
    _require(ssm_cfg, "config.json, ssm_cfg", **fixed)
    d_model = _get(hf, "d_model", int)
    multiple = _get(hf, "pad_vocab_size_multiple", int, 8)
    d_inner = _get(ssm_cfg, "expand", int, 2) * d_model
    return ModelConfig(
        vocab_size=math.ceil(_get(hf, "vocab_size", int) / multiple) * multiple,
        d_model=d_model,
        layer_types=("mamba",) * _get(hf, "n_layer", int),
        tie_embeddings=_get(hf, "tie_embeddings", bool, True),
        ssm=SSMConfig(
            d_state=_get(ssm_cfg, "d_state", int, 16),
            dt_rank=_dt_rank(ssm_cfg.get("dt_rank"), d_model),
            d_inner=d_inner,
            d_xb=d_inner,
            d_conv=_get(ssm_cfg, "d_conv", int, 4),
            inputs_from="conv",
        ),
        model_type="mamba",
        **_token_ids(hf, generation),
    )


def _transformers_mamba_config(hf: Json, generation: Json) -> ModelConfig:
    _require(hf, "config.json", use_bias=False, use_conv_bias=True, hidden_act="silu")
    d_model = _get(hf, "hidden_size", int)
    expand = _get(hf, "expand", int, 2)
    d_inner = _get(hf, "intermediate_size", int, expand * d_model)
    return ModelConfig(
        vocab_size=_get(hf, "vocab_size", int),
        d_model=d_model,
        layer_types=("mamba",) * _get(hf, "num_hidden_layers", int),
        rms_norm_eps=_get(hf, "layer_norm_epsilon", float, 1e-5),
        tie_embeddings=_get(hf, "tie_word_embeddings", bool, True),
        ssm=SSMConfig(
            d_state=_get(hf, "state_size", int, 16),
            dt_rank=_dt_rank(hf.get("time_step_rank"), d_model),
            d_inner=d_inner,
            d_xb=d_inner,
            d_conv=_get(hf, "conv_kernel", int, 4),
            inputs_from="conv",
        ),
        model_type="mamba",
        **_token_ids(hf, generation),
    )


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the config.json of an attention model, or of a hybrid's teacher.

    The keys are those of transformers 4, which 5 reads too, as the hybrids' own loader
    needs an old transformers.
    """
    traits = _TRAITS.get(config.model_type)
    if traits is None:
        raise UserError(
            f"cannot export model_type {config.model_type!r}; supported: "
            f"{', '.join(_TRAITS)}"
        )
    if traits != (config.attention_bias, config.qk_norm):
        raise UserError(
            f"model_type {config.model_type!r} means attention_bias={traits[0]} and "
            f"qk_norm={traits[1]}, but the config has {config.attention_bias} and "
            f"{config.qk_norm}; set a model_type that fits"
        )
    values = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": (
            dataclasses.asdict(config.rope_scaling) if config.rope_scaling else None
        ),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        **token_ids(config),
    }
    return values | _window_keys(config)


def _window_keys(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    if config.model_type == "mistral":
        return {"sliding_window": window}
    if config.model_type in ("qwen2", "qwen3"):
        return {
            "sliding_window": window,
            "use_sliding_window": window is not None,
            "max_window_layers": 0 if window is not None else config.n_layers,
        }
    if window is not None:
        raise UserError(
            f"model_type {config.model_type!r} has no sliding window; export it as "
            "model_type 'mistral'"
        )
    return {"attention_bias": False, "mlp_bias": False}


def token_ids(config: ModelConfig) -> dict[str, Any]:
    """Returns the special tokens as config.json and generation_config.json do."""
    eos = list(config.eos_token_ids)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_token_id,
    }


def to_mamba_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the mamba_config.json of a hybrid."""
    ssm = config.ssm
    kinds = set(config.layer_types) - {"attention"}
    if ssm is None or len(kinds) != 1:
        raise UserError(
            f"the released hybrid format holds one kind of Mamba layer, not {kinds}"
        )
    ssm_cfg: dict[str, Any] = {"expand": 1}
    if kinds == {"mamba2"}:
        ssm_cfg |= {"ngroups": config.n_heads, "d_state": ssm.d_state}
    else:
        if ssm.d_state != 16:
            ssm_cfg["d_state"] = ssm.d_state
        if ssm.dt_rank != _dt_rank("auto", config.d_model):
            ssm_cfg["dt_rank"] = ssm.dt_rank
    if ssm.d_conv != 4:
        ssm_cfg["d_conv"] = ssm.d_conv
    return {
        "d_model": config.d_model,
        "ssm_cfg": ssm_cfg,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "d_inner": ssm.d_inner,
        "d_xb": ssm.d_xb,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "n_layer": config.n_layers,
        "attn_layers": [
            i for i, k in enumerate(config.layer_types) if k == "attention"
        ],
    }
