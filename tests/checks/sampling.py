"""Distributions: filters against NumPy, draws against chi-square."""

import dataclasses
import functools

import jax
import numpy as np
from scipy import stats

from mil_jax.generate import sampler, speculative
from mil_jax.generate.sampler import Sampling

from . import oracle, tiny

SAMPLINGS = {
    "plain": Sampling(temperature=1.0),
    "cold": Sampling(temperature=0.6),
    "top_k": Sampling(temperature=1.2, top_k=3),
    "top_p": Sampling(temperature=1.0, top_p=0.8),
    "both": Sampling(temperature=0.9, top_k=4, top_p=0.85),
}


def filtered(logits, sampling):
    """Returns the distribution of one vector of distinct logits, token by token."""
    logits = np.asarray(logits, np.float64) / sampling.temperature
    weights = np.exp(logits - logits.max())
    order = np.argsort(-logits)
    if sampling.top_k:
        weights[order[sampling.top_k :]] = 0.0
    weights /= weights.sum()
    mass = 0.0
    for token in order:
        if mass >= sampling.top_p:
            weights[token] = 0.0
        mass += weights[token]
    return weights / weights.sum()


def check_filter(sampling):
    logits = np.random.default_rng(0).normal(0, 1.5, (6, 9)).astype(np.float32)
    actual = np.exp(np.asarray(sampler.log_probs(logits, sampling), np.float64))
    expected = np.stack([filtered(row, sampling) for row in logits])
    np.testing.assert_array_equal(actual > 0, expected > 0)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def assert_follows(tokens, probs, name="tokens"):
    """Chi-square test of draws; a token without probability must not occur."""
    counts = np.bincount(np.asarray(tokens), minlength=len(probs))
    assert len(counts) == len(probs), f"{name}: out of range"
    possible = probs > 0
    assert not counts[~possible].any(), f"{name}: an excluded token was drawn"
    assert counts.sum() > 200
    if possible.sum() == 1:
        return
    expected = probs[possible] * counts.sum()
    result = stats.chisquare(counts[possible], expected)
    assert result.pvalue > 1e-3, f"{name}: p = {result.pvalue:.1e}"


def check_draws(sampling):
    logits = np.random.default_rng(1).normal(0, 1.2, 7).astype(np.float32)
    rows = np.tile(logits, (20000, 1))
    tokens = sampler.sample(jax.random.key(0), rows, sampling)
    assert_follows(tokens, filtered(logits, sampling))


def check_verify_draws(sampling):
    """Tokens that come out of verification follow the target at every place."""
    rng = np.random.default_rng(2)
    rows, k, vocab = 40000, 2, 6
    target = rng.normal(0, 1.2, (k + 1, vocab)).astype(np.float32)
    draft = (0.5 * target[:k] + rng.normal(0, 1.0, (k, vocab))).astype(np.float32)
    p = [filtered(row, sampling) for row in target]
    q = [filtered(row, sampling) for row in draft]
    drafts = np.stack([rng.choice(vocab, rows, p=row) for row in q], axis=1)
    verdict = jax.jit(functools.partial(speculative.verify, sampling=sampling))(
        jax.random.key(3),
        np.tile(target, (rows, 1, 1)),
        np.tile(draft, (rows, 1, 1)),
        drafts.astype(np.int32),
    )
    accepted = np.asarray(verdict.num_accepted)
    tokens = np.asarray(verdict.tokens)
    for place in range(k + 1):
        reached = accepted >= place
        assert_follows(tokens[reached, place], p[place], f"place {place}")
        if place < k:
            # The rate of Theorem 3.5 in 2211.17192.
            rate = np.minimum(p[place], q[place]).sum()
            share = (accepted[reached] > place).mean()
            assert abs(share - rate) < 5 * np.sqrt(0.25 / reached.sum())
    assert 0.2 < accepted.mean() < 1.9
    for place in range(k):
        kept = accepted > place
        np.testing.assert_array_equal(tokens[kept, place], drafts[kept, place])
    behind = np.arange(k + 1)[None] > accepted[:, None]
    assert not tokens[behind].any()


SMALL_VOCAB = 6


@functools.cache
def small(kind):
    """Returns a model of six tokens and its oracle."""
    config = dataclasses.replace(tiny.CONFIGS[kind], vocab_size=SMALL_VOCAB)
    params = tiny.random_params(config)
    return tiny.build(config, params), oracle.Model(config, params)


def joint(reference, prompt, sampling):
    """Returns P(second token, third token) after `prompt`, exactly."""
    probs = np.zeros((SMALL_VOCAB, SMALL_VOCAB))
    first = filtered(reference(prompt)[-1], sampling)
    for a in range(SMALL_VOCAB):
        second = filtered(reference([*prompt, a])[-1], sampling)
        for b in range(SMALL_VOCAB):
            third = filtered(reference([*prompt, a, b])[-1], sampling)
            probs[b] += first[a] * second[b] * third
    return probs
