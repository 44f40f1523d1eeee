"""Logits and greedy tokens of tiny random models against transformers, in float32."""

import numpy as np
import pytest
from checks import tiny
from checks.compare import assert_close

from mil_jax.checkpoint import hf_import
from mil_jax.generate import decode

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("strict_jax")

LENGTH = 96
NEW_TOKENS = 20
PROMPT_LENGTHS = (31, 7)
SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
# 96 positions are six times the original length.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}
MODELS = {
    "llama": (transformers.LlamaConfig, {"rms_norm_eps": 1e-2}),
    "llama_mha": (transformers.LlamaConfig, {"num_key_value_heads": 4, **THETA}),
    "llama_scaled": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama_tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral_window": (transformers.MistralConfig, {"sliding_window": 6}),
    "qwen2": (transformers.Qwen2Config, THETA),
    "qwen2_window": (transformers.Qwen2Config, WINDOW),
    "qwen3": (transformers.Qwen3Config, THETA),
}
# What these have, others have too.
RARE = ("llama_mha", "qwen2_window")
MAMBA = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 3,
    "time_step_rank": 3,
}


def make_model(name):
    torch.manual_seed(0)
    if name == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA))
    else:
        cls, changes = MODELS[name]
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        config = cls(**(SIZES | ids | changes))
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("A_log"):
                value.uniform_(-1.5, 1.0)
            elif value.ndim == 1:
                value.normal_(std=0.4).add_(1.0 if "norm" in key else 0.0)
            else:
                is_tied = "embed" in key and model.config.tie_word_embeddings
                value.normal_(std=0.25 if is_tied else 1.5 * value[0].numel() ** -0.5)
    return model.eval()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in RARE else [])
        for name in (*MODELS, "mamba")
    ],
)
def pair(request, tmp_path_factory):
    """The transformers model, and ours as imported from what it saved."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_model(request.param)
    theirs.save_pretrained(folder)
    checkpoint = hf_import.load(folder)
    return theirs, tiny.build(checkpoint.config, checkpoint.params)


def their_logits(model, row):
    with torch.no_grad():
        return model(torch.from_numpy(row[None]).long()).logits[0].numpy()


def test_logits(pair):
    """A full row, one padded on the left and one padded on the right."""
    theirs, ours = pair
    tokens = tiny.tokens(3, LENGTH)
    ids = np.ones((3, LENGTH), np.int32)
    ids[1, :20] = 0
    ids[2, 60:] = 0
    actual = np.asarray(tiny.forward(ours, tokens, ids))
    for row, logits, real in zip(tokens, actual, ids == 1, strict=True):
        expected = their_logits(theirs, row[real])
        assert expected.std() > 0.3
        assert_close(logits[real], expected, atol=1e-4)


def test_greedy_tokens(pair):
    """A ragged batch of ours against single rows of theirs."""
    theirs, ours = pair
    prompts = [tiny.tokens(1, n, seed=n)[0] for n in PROMPT_LENGTHS]
    answers = decode.generate(ours, prompts, max_new_tokens=NEW_TOKENS, eos_ids=())
    for prompt, answer in zip(prompts, answers.rows(), strict=True):
        ids = torch.from_numpy(prompt[None]).long()
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert len(set(expected.tolist())) > 2
        np.testing.assert_array_equal(answer, expected.numpy())
