import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import sampling as checks

from mil_jax.errors import UserError
from mil_jax.generate import sampler
from mil_jax.generate.sampler import Sampling

pytestmark = pytest.mark.usefixtures("strict_jax")
every_sampling = pytest.mark.parametrize("name", checks.SAMPLINGS)


@every_sampling
def test_filters(name):
    checks.check_filter(checks.SAMPLINGS[name])


@every_sampling
def test_draws_follow_the_distribution(name):
    checks.check_draws(checks.SAMPLINGS[name])


def probs(weights, **kwargs):
    logits = jnp.log(jnp.array(weights))
    sampling = Sampling(**({"temperature": 1.0} | kwargs))
    return np.exp(sampler.log_probs(logits, sampling))


def test_by_hand():
    weights = [0.1, 0.4, 0.2, 0.3]
    close = np.testing.assert_allclose
    close(probs(weights), weights, rtol=1e-5)
    close(probs(weights, top_k=1), [0, 1, 0, 0])
    close(probs(weights, top_k=2), [0, 4 / 7, 0, 3 / 7], rtol=1e-5)
    close(probs(weights, top_k=4), weights, rtol=1e-5)
    close(probs(weights, top_k=9), weights, rtol=1e-5)
    # The mass before the third token is 0.7.
    close(probs(weights, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9], rtol=1e-5)
    close(probs(weights, top_p=0.69), [0, 4 / 7, 0, 3 / 7], rtol=1e-5)
    close(probs(weights, top_p=1e-6), [0, 1, 0, 0])
    # Top-p counts what top-k left: 4/7 is beyond one half.
    close(probs(weights, top_k=2, top_p=0.5), [0, 1, 0, 0])
    # Temperature 1/2 squares the weights.
    close(probs(weights, temperature=0.5), np.square(weights) / 0.3, rtol=1e-5)


def test_ties_at_the_border_stay():
    np.testing.assert_allclose(probs([0.2, 0.2, 0.2, 0.4], top_k=2), [0.2] * 3 + [0.4])


def test_greedy_takes_the_likeliest():
    logits = jnp.array([[0.0, 3.0, 2.0], [5.0, -1.0, 4.0]])
    tokens = sampler.sample(jax.random.key(0), logits, Sampling())
    assert tokens.dtype == jnp.int32
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_values_out_of_range_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        Sampling(**kwargs)
