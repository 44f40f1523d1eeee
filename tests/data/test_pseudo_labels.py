"""Unit and crash tests of pseudo-labels, with a tiny model of random weights."""

import shutil
import signal
from pathlib import Path

import labels_run
import numpy as np
import pytest
from checks import process
from labels_run import CONFIG, OPTIONS, PROMPTS, write

from mil_jax.data import pseudo_labels
from mil_jax.data.chat import encode_prompt
from mil_jax.data.records import RecordSource, read_manifest
from mil_jax.errors import UserError
from mil_jax.generate import decode
from mil_jax.generate.sampler import Sampling


@pytest.fixture(scope="module", autouse=True)
def built_once():
    """One model and tokenizer for all tests, so that one program is compiled."""
    model, tokenizer = labels_run.model(), labels_run.tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels_run, "model", lambda: model)
        patch.setattr(labels_run, "tokenizer", lambda: tokenizer)
        yield


@pytest.fixture(scope="module")
def prompts():
    tokenizer = labels_run.tokenizer()
    return [encode_prompt(tokenizer, chat) for chat in PROMPTS]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    decode._start.clear_cache()
    decode.advance.clear_cache()
    write(folder)
    return folder


def _answers(folder, prompts):
    """Returns the answers after checking prompt and mask of every record."""
    records = RecordSource(folder)
    assert len(records) == len(prompts)
    answers = []
    for (tokens, mask), prompt in zip(records, prompts, strict=True):
        np.testing.assert_array_equal(tokens[: prompt.size], prompt)
        np.testing.assert_array_equal(mask, np.arange(tokens.size) >= prompt.size)
        answers.append(tokens[prompt.size :].tolist())
    return answers


def _assert_same(folder, other):
    first, second = RecordSource(folder), RecordSource(other)
    assert first.manifest == second.manifest
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)


@pytest.fixture
def calls(monkeypatch):
    """Counts batches; raises at those in `calls.fail_at`."""

    class Calls(list):
        fail_at = ()

    seen = Calls()

    def generate(model, rows, **kwargs):
        if len(seen) in seen.fail_at:
            seen.fail_at = ()
            raise KeyboardInterrupt
        seen.append((len(rows), kwargs["seed"]))
        return decode.generate(model, rows, **kwargs)

    monkeypatch.setattr(pseudo_labels, "generate", generate)
    return seen


class TestAnswers:
    def test_end_with_eos_or_at_the_limit(self, undisturbed, prompts):
        answers = _answers(undisturbed, prompts)
        ended = [a for a in answers if a[-1] in CONFIG.eos_token_ids]
        assert 5 < len(ended) < len(answers) - 5
        for answer in answers:
            assert not set(answer[:-1]) & set(CONFIG.eos_token_ids)
            assert len(answer) == 12 or answer in ended

    def test_are_sampled_anew_in_every_batch(self, undisturbed, prompts):
        assert len({tuple(a) for a in _answers(undisturbed, prompts)}) > 30

    def test_greedy_answers_are_those_of_each_prompt_alone(self, tmp_path, prompts):
        few = PROMPTS[:3]
        write(tmp_path, few, sampling=Sampling())
        for answer, prompt in zip(
            _answers(tmp_path, prompts[:3]), prompts[:3], strict=True
        ):
            alone = decode.generate(
                labels_run.model(), [prompt, prompt], max_new_tokens=12
            )
            assert answer == alone.rows()[0].tolist()

    def test_prompts_of_one_bucket_share_a_program(self, undisturbed, prompts):
        """Prompts are padded to multiples of 32 tokens; no other length is compiled."""
        pairs = [prompts[i : i + 2] for i in range(0, len(prompts), 2)]
        longest = {max(p.size for p in pair) for pair in pairs}
        buckets = {-(-size // decode.PROMPT_BUCKET) for size in longest}
        assert len(buckets) < len(longest)
        # The module's fixture cleared the cache before the run.
        for program in (decode._start, decode.advance):
            assert program._cache_size() <= len(buckets) + 2

    def test_another_seed(self, undisturbed, tmp_path, prompts):
        write(tmp_path, seed=1)
        assert _answers(tmp_path, prompts) != _answers(undisturbed, prompts)

    def test_batches_are_always_full(self, calls, tmp_path, prompts):
        write(tmp_path, PROMPTS[:5])
        assert calls == [(2, 0), (2, 2), (2, 4)]
        assert len(_answers(tmp_path, prompts[:5])) == 5


class TestRoom:
    def test_answers_are_cut_and_long_prompts_stay_empty(self, tmp_path, prompts):
        """Records and prompts keep the same numbers."""
        sizes = sorted(prompt.size for prompt in prompts)
        limit = sizes[len(sizes) // 2]
        assert sizes[0] < limit < sizes[-1]
        write(tmp_path, max_length=limit)
        for answer, prompt in zip(_answers(tmp_path, prompts), prompts, strict=True):
            room = limit - prompt.size
            if room <= 0:
                assert answer == []
            else:
                assert 1 <= len(answer) <= min(room, 12)

    def test_cut_answers_begin_as_whole_ones(self, undisturbed, tmp_path, prompts):
        limit = max(prompt.size for prompt in prompts) + 2
        write(tmp_path, max_length=limit)
        pairs = zip(
            _answers(tmp_path, prompts), _answers(undisturbed, prompts), prompts,
            strict=True,
        )  # fmt: skip
        for cut, whole, prompt in pairs:
            assert cut == whole[: limit - prompt.size]

    def test_no_prompt_fits(self, calls, tmp_path, prompts):
        write(tmp_path, PROMPTS[:3], max_length=min(p.size for p in prompts))
        assert calls == []
        assert _answers(tmp_path, prompts[:3]) == [[], [], []]


class TestContinued:
    @pytest.mark.parametrize("fail_at", [0, 4, 11])
    def test_after_an_error(self, calls, undisturbed, tmp_path, fail_at):
        """Shards hold four batches: nothing, one and two are safe."""
        calls.fail_at = (fail_at,)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
        written = 8 * (fail_at // 4)
        assert sum(read_manifest(tmp_path).counts) == written
        calls.clear()
        write(tmp_path)
        # Goes on with the first missing shard.
        assert calls[0] == (2, written)
        _assert_same(tmp_path, undisturbed)

    def test_finished_folder_is_left_alone(self, calls, undisturbed, tmp_path):
        copy = shutil.copytree(undisturbed, tmp_path / "copy")
        write(copy)
        assert calls == []
        _assert_same(copy, undisturbed)

    def test_other_settings_are_refused(self, calls, undisturbed, tmp_path):
        copy = shutil.copytree(undisturbed, tmp_path / "copy")
        with pytest.raises(UserError, match="records of another run"):
            write(copy, fingerprint="g")
        assert calls == []

    def test_after_sigkill(self, undisturbed, tmp_path):
        """A real process, killed once a shard is there."""
        folder = tmp_path / "labels"
        code, _ = process.stop_when(
            [Path(labels_run.__file__), folder],
            process.environment(tmp_path / "compiled"),
            lambda: (folder / "shard-00001.array_record").exists(),
        )
        assert code == -signal.SIGKILL
        assert not read_manifest(folder).complete
        assert 8 <= sum(read_manifest(folder).counts) < len(PROMPTS)
        write(folder)
        _assert_same(folder, undisturbed)
        names = {path.name for path in folder.iterdir()}
        shards = -(-len(PROMPTS) // (4 * OPTIONS["batch_size"]))
        assert names == {"manifest.json"} | {
            f"shard-{i:05d}.array_record" for i in range(shards)
        }
