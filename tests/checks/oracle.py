"""The models as NumPy loops in float64 over one row of tokens, from the formulas.

Names of weights are those of `mil_jax.array_types.Params`; kernels are [in, out].
"""

import functools
import math

import numpy as np


def silu(v):
    return v / (1 + np.exp(-v))


def softplus(v):
    return np.logaddexp(v, 0.0)


def rms_norm(v, scale, eps):
    return v / np.sqrt((v**2).mean(-1, keepdims=True) + eps) * scale


def rope_frequency(i, config):
    """Radians per position of pair i, with the rule of Llama 3.1."""
    frequency = config.rope_theta ** (-2 * i / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    long = s.original_max_position_embeddings / s.low_freq_factor
    short = s.original_max_position_embeddings / s.high_freq_factor
    if wavelength > long:
        return frequency / s.factor
    if wavelength < short:
        return frequency
    smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    return (1 - smooth) * frequency / s.factor + smooth * frequency


def rotate(head, config):
    """Rotates [L, P] at positions 0..L-1; pair i is (i, i + P/2), as a complex number."""
    length, half = head.shape[0], head.shape[1] // 2
    pairs = head[:, :half] + 1j * head[:, half:]
    frequencies = np.array([rope_frequency(i, config) for i in range(half)])
    pairs = pairs * np.exp(1j * np.arange(length)[:, None] * frequencies)
    return np.concatenate([pairs.real, pairs.imag], axis=1)


def attention(u, w, config):
    """Grouped-query attention over one row [L, D]."""
    length, p = u.shape[0], config.head_dim
    repeats = config.n_heads // config.n_kv_heads

    def head(name, h):
        out = u @ w[f"attn.{name}_proj.kernel"][:, h * p : (h + 1) * p]
        if config.attention_bias:
            out = out + w[f"attn.{name}_proj.bias"][h * p : (h + 1) * p]
        if config.qk_norm and name in "qk":
            out = rms_norm(out, w[f"attn.{name}_norm.scale"], config.rms_norm_eps)
        return rotate(out, config) if name in "qk" else out

    outputs = []
    for h in range(config.n_heads):
        q, k, v = head("q", h), head("k", h // repeats), head("v", h // repeats)
        out = np.zeros((length, p))
        for t in range(length):
            window = config.sliding_window or length
            seen = range(max(0, t - window + 1), t + 1)
            scores = np.array([q[t] @ k[s] / math.sqrt(p) for s in seen])
            weights = np.exp(scores - scores.max())
            out[t] = (weights / weights.sum()) @ v[seen.start : seen.stop]
        outputs.append(out)
    return np.concatenate(outputs, axis=1) @ w["attn.o_proj.kernel"]


def causal_conv(x, kernel, bias):
    """Depthwise over [L, C]; the last tap meets the current token."""
    taps = kernel.shape[0]
    y = np.zeros_like(x)
    for t in range(x.shape[0]):
        for back in range(min(taps, t + 1)):
            y[t] += kernel[taps - 1 - back] * x[t - back]
    return y + bias


def mamba(u, w, config):
    """Paper Alg. 1: hybrid Mamba, or pure Mamba (`inputs_from == "conv"`)."""
    ssm = config.ssm
    length, channels, n = u.shape[0], ssm.d_inner, ssm.d_state
    x, z = u @ w["mamba.x_proj.kernel"], u @ w["mamba.z_proj.kernel"]
    is_pure = ssm.inputs_from == "conv"
    repeats = channels // ssm.d_xb

    def expand(v):
        """[L, X] -> [L, E]: each group of n channels, `repeats` times in a row."""
        groups = [v[:, g : g + n] for g in range(0, ssm.d_xb, n)]
        return np.concatenate([g for g in groups for _ in range(repeats)], axis=1)

    if not is_pure:
        x = expand(x)
    x = silu(causal_conv(x, w["mamba.conv_kernel"], w["mamba.conv_bias"]))
    source = x if is_pure else u
    B, C = source @ w["mamba.B_proj.kernel"], source @ w["mamba.C_proj.kernel"]
    dt = source @ w["mamba.dt_down.kernel"] @ w["mamba.dt_up.kernel"]
    dt = softplus(dt + w["mamba.dt_bias"])
    A = -np.exp(w["mamba.A_log"])
    if is_pure:
        B = np.tile(B, (1, channels // n))
        C = np.tile(C, (1, channels // n))
    else:
        B = expand(B)
    h = np.zeros((channels, n))
    y = np.zeros((length, channels))
    for t in range(length):
        for e in range(channels):
            group = slice(e // n * n, e // n * n + n)
            h[e] = np.exp(dt[t, e] * A[e]) * h[e] + dt[t, e] * B[t, group] * x[t, e]
            y[t, e] = C[t, group] @ h[e] + w["mamba.D"][e] * x[t, e]
    return (y * silu(z)) @ w["mamba.out_proj.kernel"]


def mamba2(u, w, config):
    """Mamba-2 (2405.21060) with one group per head, as the released hybrids have it."""
    ssm = config.ssm
    heads, kv_heads, n = config.n_heads, config.n_kv_heads, ssm.d_state
    length, p = u.shape[0], ssm.d_inner // heads
    names = ("x", "B", "C")
    xbc = [u @ w[f"mamba2.{name}_proj.kernel"] for name in names]
    xbc = np.concatenate(xbc, axis=1)
    xbc = silu(causal_conv(xbc, w["mamba2.conv_kernel"], w["mamba2.conv_bias"]))
    x, B, C = np.split(xbc, [ssm.d_xb, 2 * ssm.d_xb], axis=1)
    dt = softplus(u @ w["mamba2.dt_proj.kernel"] + w["mamba2.dt_bias"])
    A = -np.exp(w["mamba2.A_log"])
    y = np.zeros((length, heads, p))
    for h in range(heads):
        j = h // (heads // kv_heads)
        state = np.zeros((n, p))
        for t in range(length):
            x_t, B_t = x[t, j * p : (j + 1) * p], B[t, j * n : (j + 1) * n]
            decay = np.exp(dt[t, h] * A[h])
            state = decay * state + dt[t, h] * np.outer(B_t, x_t)
            y[t, h] = C[t, h * n : (h + 1) * n] @ state + w["mamba2.D"][h] * x_t
    gated = y * silu(u @ w["mamba2.z_proj.kernel"]).reshape(y.shape)
    scale = w["mamba2.norm.scale"].reshape(heads, p)
    normed = rms_norm(gated, scale, 1e-5)
    return normed.reshape(length, -1) @ w["mamba2.out_proj.kernel"]


MIXERS = {"attention": attention, "mamba": mamba, "mamba2": mamba2}


def layer(h, w, config, kind):
    """One decoder layer over [L, D]; `w` has the layer's weights, float64."""
    eps = config.rms_norm_eps
    h = h + MIXERS[kind](rms_norm(h, w["input_norm.scale"], eps), w, config)
    if config.d_ff:
        u = rms_norm(h, w["mlp_norm.scale"], eps)
        gate, up = u @ w["mlp.gate_proj.kernel"], u @ w["mlp.up_proj.kernel"]
        h = h + (silu(gate) * up) @ w["mlp.down_proj.kernel"]
    return h


def float64(params, prefix=""):
    """Returns the weights under `prefix`, without it, in float64."""
    return {
        name.removeprefix(prefix): np.asarray(value).astype(np.float64)
        for name, value in params.items()
        if name.startswith(prefix)
    }


class Model:
    """A model's logits for single rows, remembered."""

    def __init__(self, config, params):
        self.config = config
        self.outer = float64(params)
        self.layers = [float64(params, f"layers.{i}.") for i in range(config.n_layers)]
        self.logits = functools.cache(self._logits)

    def __call__(self, tokens):
        """Returns logits [L, V]."""
        return self.logits(tuple(int(t) for t in tokens))

    def _logits(self, tokens):
        h = self.outer["embed.embedding"][list(tokens)]
        for w, kind in zip(self.layers, self.config.layer_types, strict=True):
            h = layer(h, w, self.config, kind)
        h = rms_norm(h, self.outer["final_norm.scale"], self.config.rms_norm_eps)
        if self.config.tie_embeddings:
            return h @ self.outer["embed.embedding"].T
        return h @ self.outer["lm_head.kernel"]

    def greedy(self, prompt, count):
        """Returns `count` tokens, each the likeliest after all before it."""
        row = list(prompt)
        for _ in range(count):
            row.append(int(self(row)[-1].argmax()))
        return row[len(prompt) :]

    def probs(self, tokens, temperature=1.0):
        """Returns the distribution of the token after `tokens`."""
        logits = self(tokens)[-1] / temperature
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()
