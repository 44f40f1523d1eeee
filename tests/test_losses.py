"""Unit tests of the losses: values by hand, NumPy in float64 and torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import jaxprs, training
from checks.compare import assert_close

from mil_jax import losses

pytestmark = pytest.mark.usefixtures("strict_jax")


def _random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class TestTokenValues:
    def test_cross_entropy_by_hand(self):
        logits = np.log(np.float32([[1, 2, 5], [3, 3, 2]]))
        found = losses.token_cross_entropy(logits, jnp.array([2, 0]))
        assert_close(found, [np.log(8 / 5), np.log(8 / 3)], atol=1e-6)

    def test_cross_entropy_of_large_logits(self):
        logits = np.float32([[3e4, 0.0], [-3e4, 0.0]])
        found = losses.token_cross_entropy(logits, jnp.array([1, 0]))
        np.testing.assert_allclose(found, [3e4, 3e4])

    def test_cross_entropy_against_torch(self):
        torch = pytest.importorskip("torch")
        logits, labels = _random(40, 17), np.arange(40) % 17
        expected = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(labels), reduction="none"
        )
        found = losses.token_cross_entropy(logits, jnp.asarray(labels))
        assert_close(found, expected.numpy(), atol=1e-5)

    def test_kl_direction(self):
        training.check_token_kl()

    def test_kl_against_torch(self):
        torch = pytest.importorskip("torch")
        teacher, student = _random(40, 17), _random(40, 17, seed=1)
        log_p, log_q = (
            torch.log_softmax(torch.from_numpy(a), -1) for a in (teacher, student)
        )
        expected = torch.nn.functional.kl_div(
            log_q, log_p, reduction="none", log_target=True
        ).sum(-1)
        found = losses.token_kl(teacher, student)
        assert_close(found, expected.numpy(), atol=1e-5)

    def test_kl_of_equal_models_is_zero_and_stays_finite(self):
        logits = np.float32([[50.0, -50.0, 0.0]])
        assert abs(float(losses.token_kl(logits, logits)[0])) < 1e-6
        far = losses.token_kl(np.float32([[3e4, 0]]), np.float32([[0, 3e4]]))
        np.testing.assert_allclose(far, [3e4], rtol=1e-6)


class TestMeans:
    NLL = np.float32([[1, 2, 4], [8, 16, 32]])
    MASK = np.array([[True, False, True], [False, False, True]])

    def test_sequence_loss_is_the_mean_of_unmasked_tokens(self):
        assert float(losses.seq_kd_loss(self.NLL, self.MASK)) == pytest.approx(37 / 3)

    def test_word_loss_by_token(self):
        assert float(losses.word_kd_loss(self.NLL, self.MASK)) == pytest.approx(37 / 3)

    def test_word_loss_as_published_sums_padding_too(self):
        assert float(losses.word_kd_loss(self.NLL, self.MASK, "original")) == 63 / 2

    def test_no_answer_gives_zero(self):
        assert float(losses.seq_kd_loss(self.NLL, np.zeros_like(self.MASK))) == 0

    def test_masked_tokens_may_be_infinite(self):
        """And their gradient is zero, not NaN."""
        nll = np.where(self.MASK, self.NLL, np.float32(np.inf))
        value, grad = jax.value_and_grad(losses.seq_kd_loss)(nll, self.MASK)
        assert float(value) == pytest.approx(37 / 3)
        np.testing.assert_allclose(grad, self.MASK / np.float32(3))

    def test_counts_of_the_whole_batch(self):
        counts = losses.count(self.MASK)
        assert (float(counts.tokens), float(counts.rows)) == (3, 2)
        parts = [
            losses.seq_kd_loss(self.NLL[i : i + 1], self.MASK[i : i + 1], counts)
            for i in range(2)
        ]
        assert float(sum(parts)) == pytest.approx(37 / 3)
        parts = [
            losses.word_kd_loss(
                self.NLL[i : i + 1], self.MASK[i : i + 1], "original", counts
            )
            for i in range(2)
        ]
        assert float(sum(parts)) == 63 / 2

    def test_counts_of_a_large_batch(self):
        """Exact beyond what float16 or a sum of booleans would hold."""
        assert float(losses.count(np.ones((3, 70001), bool)).tokens) == 210003

    def test_weights_of_equation_2(self):
        kl = 10 * self.NLL
        loss, parts = losses.distill_loss(
            self.NLL, kl, self.MASK, ce_weight=2.0, kl_weight=0.1
        )
        assert float(loss) == pytest.approx(2 * 37 / 3 + 0.1 * 370 / 3)
        assert float(parts["ce"]) == pytest.approx(37 / 3)
        assert float(parts["kl"]) == pytest.approx(370 / 3)

    def test_without_teacher(self):
        loss, parts = losses.distill_loss(
            self.NLL, None, self.MASK, ce_weight=2.0, kl_weight=0.0
        )
        assert float(loss) == pytest.approx(2 * 37 / 3)
        assert set(parts) == {"loss", "ce"}


BATCH, LENGTH, WIDTH, VOCAB = 3, 7, 5, 23


def _inputs(length=LENGTH):
    hidden, other = _random(BATCH, length, WIDTH), _random(BATCH, length, 4, seed=1)
    heads = _random(WIDTH, VOCAB, seed=2), _random(4, VOCAB, seed=3)
    labels = np.arange(BATCH * length).reshape(BATCH, length) * 5 % VOCAB
    return hidden, other, heads, jnp.asarray(labels, jnp.int32)


def _chunked_sum(hidden, other, heads, labels, chunk):
    """Returns a sum in which every token's nll and kl has its own weight."""
    per_token = losses.nll_and_kl_of_slice(
        lambda h: h @ heads[0], lambda h: h @ heads[1]
    )
    nll, kl = losses.over_chunks(per_token, (hidden, other, labels), chunk=chunk)
    weights = 1 + jnp.arange(nll.size, dtype=jnp.float32).reshape(nll.shape)
    return jnp.sum(nll * weights) + jnp.sum(kl * weights[::-1]), (nll, kl)


class TestChunks:
    @pytest.mark.parametrize("chunk", [1, 3, 6, 7, 512])
    def test_equal_to_whole_with_gradients(self, chunk):
        hidden, other, heads, labels = _inputs()

        def whole(hidden, other, heads):
            student, teacher = hidden @ heads[0], other @ heads[1]
            nll = losses.token_cross_entropy(student, labels)
            kl = losses.token_kl(jax.lax.stop_gradient(teacher), student)
            weights = 1 + jnp.arange(nll.size, dtype=jnp.float32).reshape(nll.shape)
            return jnp.sum(nll * weights) + jnp.sum(kl * weights[::-1]), (nll, kl)

        def chunked(hidden, other, heads):
            return _chunked_sum(hidden, other, heads, labels, chunk)

        grad = [
            jax.grad(fn, argnums=(0, 1, 2), has_aux=True)(hidden, other, heads)
            for fn in (chunked, whole)
        ]
        for found, expected in zip(grad[0][1], grad[1][1], strict=True):
            assert_close(found, expected, atol=1e-5)
        (d_hidden, d_other, d_heads), (e_hidden, _, e_heads) = grad[0][0], grad[1][0]
        assert_close(d_hidden, e_hidden, atol=1e-4)
        assert_close(d_heads[0], e_heads[0], atol=1e-3)
        # Nothing flows into the teacher.
        assert not np.any(d_other) and not np.any(d_heads[1])

    @pytest.mark.parametrize("length", [1, 6, 7])
    def test_nll_alone(self, length):
        hidden, _, heads, labels = _inputs(length)
        found = losses.token_nll(lambda h: h @ heads[0], hidden, labels, chunk=3)
        expected = losses.token_cross_entropy(hidden @ heads[0], labels)
        assert_close(found, expected, atol=1e-5)


MASK = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 4 > 0


def _reduce(nll, kl):
    return losses.distill_loss(nll, kl, MASK, ce_weight=1.0, kl_weight=0.3)


def _distilled(over, hidden, other, heads, labels, chunk):
    """Returns loss and metrics, the per-token losses joined and reduced by `over`."""
    per_token = losses.nll_and_kl_of_slice(
        lambda h: h @ heads[0], lambda h: h @ heads[1]
    )
    return over(per_token, (hidden, other, labels), chunk)


def _reduced(per_token, arrays, chunk):
    return losses.reduce_over_chunks(per_token, _reduce, arrays, chunk=chunk)


def _joined(per_token, arrays, chunk):
    return _reduce(*losses.over_chunks(per_token, arrays, chunk=chunk))


class TestReducedChunks:
    """The loss whose gradients are taken in the forward pass."""

    @pytest.mark.parametrize("chunk", [1, 3, 7, 512])
    def test_equal_to_joined_chunks(self, chunk):
        hidden, other, heads, labels = _inputs()

        def value_and_grad(over):
            def loss(hidden, other, heads):
                return _distilled(over, hidden, other, heads, labels, chunk)

            grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
            return jax.jit(grad)(hidden, other, heads)

        found, expected = value_and_grad(_reduced), value_and_grad(_joined)
        pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
        for a, b in [pair for pair in pairs if np.any(pair[1])]:
            assert_close(a, b, atol=1e-6)
        # Nothing flows into the teacher.
        assert not np.any(found[1][1]) and not np.any(found[1][2][1])

    def test_gradient_is_scaled_by_what_follows(self):
        hidden, other, heads, labels = _inputs()

        def loss(hidden, factor):
            value, _ = _distilled(_reduced, hidden, other, heads, labels, 3)
            return factor * value**2

        value, _ = _distilled(_reduced, hidden, other, heads, labels, 3)
        once = jax.grad(lambda h: _distilled(_reduced, h, other, heads, labels, 3)[0])(
            hidden
        )
        found = jax.grad(loss)(hidden, 5.0)
        assert_close(found, 10.0 * float(value) * once, atol=1e-4)

    def test_without_gradient(self):
        arguments = _inputs()
        found = _distilled(_reduced, *arguments, 3)
        expected = _distilled(_joined, *arguments, 3)
        assert_close(found[0], expected[0], atol=1e-6)
        assert_close(found[1]["kl"], expected[1]["kl"], atol=1e-6)

    def test_products_are_not_repeated(self):
        """Logits of both models, once, and the way back into the hidden states."""
        hidden, other, heads, labels = _inputs()

        def loss(over, hidden):
            return _distilled(over, hidden, other, heads, labels, 3)[0]

        def count(over):
            grad = jax.grad(functools.partial(loss, over))
            return str(jax.make_jaxpr(grad)(hidden)).count(" dot_general[")

        counts = [count(over) for over in (_reduced, _joined)]
        assert counts == [3, 5]

    def test_tokens_that_do_not_count_are_left_out(self):
        """Wherever they lie: every row has as many that count, at other places."""
        hidden, other, heads, labels = _inputs()
        mask = np.zeros((BATCH, LENGTH), bool)
        for row, places in enumerate([(0, 3, 6), (4, 5, 6), (1, 2, 5)]):
            mask[row, list(places)] = True

        def loss(hidden):
            per_token = losses.nll_and_kl_of_slice(
                lambda h: h @ heads[0], lambda h: h @ heads[1]
            )

            def reduce(nll, kl):
                return losses.distill_loss(nll, kl, mask, ce_weight=1.0, kl_weight=0.3)

            arrays = (hidden, other, labels)
            return losses.reduce_over_chunks(per_token, reduce, arrays, chunk=1)[0]

        expected = jax.value_and_grad(loss)(hidden)
        poisoned = np.where(mask[:, :, None], hidden, np.float32(np.nan))
        found = jax.value_and_grad(loss)(poisoned)
        assert_close(found[0], expected[0], atol=1e-6)
        assert_close(found[1], expected[1], atol=1e-6)
        assert not np.any(np.asarray(found[1])[~mask])

    def test_only_a_slice_of_logits_is_held(self):
        hidden, other = _random(2, 64, 4), _random(2, 64, 4)
        heads = _random(4, 1000), _random(4, 1000)
        labels = jnp.zeros((2, 64), jnp.int32)
        mask = np.ones((2, 64), bool)

        def loss(hidden, heads):
            per_token = losses.nll_and_kl_of_slice(
                lambda h: h @ heads[0], lambda h: h @ heads[1]
            )

            def reduce(nll, kl):
                return losses.distill_loss(nll, kl, mask, ce_weight=1.0, kl_weight=1.0)

            arrays = (hidden, other, labels)
            return losses.reduce_over_chunks(per_token, reduce, arrays, chunk=8)[0]

        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, heads).jaxpr
        assert jaxprs.largest(jaxpr) == 2 * 8 * 1000


class TestMemory:
    """Forward and backward of the chunked loss hold logits of one slice only."""

    LENGTH, CHUNK, VOCAB = 64, 8, 1000

    def _largest(self, chunk):
        hidden, other = _random(2, self.LENGTH, 4), _random(2, self.LENGTH, 4)
        heads = _random(4, self.VOCAB), _random(4, self.VOCAB)
        labels = jnp.zeros((2, self.LENGTH), jnp.int32)

        def loss(hidden, heads):
            return _chunked_sum(hidden, other, heads, labels, chunk)[0]

        grad = jax.grad(loss, argnums=(0, 1))
        return jaxprs.largest(jax.make_jaxpr(grad)(hidden, heads).jaxpr), (
            jax.jit(grad).lower(hidden, heads).compile().memory_analysis()
        )

    def test_no_array_of_all_logits(self):
        largest, memory = self._largest(self.CHUNK)
        assert largest == 2 * self.CHUNK * self.VOCAB
        assert memory.temp_size_in_bytes < 4 * 2 * self.LENGTH * self.VOCAB

    def test_the_measure_sees_them(self):
        largest, memory = self._largest(self.LENGTH)
        assert largest >= 2 * self.LENGTH * self.VOCAB
        assert memory.temp_size_in_bytes > 4 * 2 * self.LENGTH * self.VOCAB


class TestPreferences:
    def test_numbers_by_hand(self):
        training.check_dpo_numbers()

    def test_against_torch_with_gradients(self):
        torch = pytest.importorskip("torch")
        arrays = [_random(6, seed=i) * 5 for i in range(4)]

        def loss(policy_chosen, policy_rejected):
            return losses.dpo_loss(
                policy_chosen, policy_rejected, *arrays[2:], beta=0.3
            )

        (value, _), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            *arrays[:2]
        )
        chosen, rejected = (torch.from_numpy(a).requires_grad_() for a in arrays[:2])
        ratio = (chosen - rejected) - torch.from_numpy(arrays[2] - arrays[3])
        expected = -torch.nn.functional.logsigmoid(0.3 * ratio).mean()
        expected.backward()
        assert_close(value, expected.item(), atol=1e-5)
        assert_close(grads[0], chosen.grad.numpy(), atol=1e-5)
        assert_close(grads[1], rejected.grad.numpy(), atol=1e-5)

    def test_equal_to_the_reference_is_ln_2(self):
        a, b = _random(5), _random(5, seed=1)
        loss, metrics = losses.dpo_loss(a, b, a, b, beta=0.1)
        assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
        assert float(metrics["accuracy"]) == 0

    def test_extreme_margins_stay_finite(self):
        far, near = np.float32([1e4]), np.float32([-1e4])
        for chosen, rejected, expected in ((far, near, 0), (near, far, 2e4)):
            loss, _ = losses.dpo_loss(chosen, rejected, near * 0, near * 0, beta=1.0)
            assert float(loss) == pytest.approx(expected)

    def test_parts_of_a_batch_add_up(self):
        arrays = [_random(6, seed=i) for i in range(4)]
        whole, metrics = losses.dpo_loss(*arrays, beta=0.3)
        rows = jnp.float32(6)
        parts = [
            losses.dpo_loss(*(a[i : i + 2] for a in arrays), beta=0.3, rows=rows)
            for i in (0, 2, 4)
        ]
        assert_close(sum(p for p, _ in parts), whole, atol=1e-6)
        for name, value in metrics.items():
            np.testing.assert_allclose(sum(m[name] for _, m in parts), value, rtol=1e-5)
