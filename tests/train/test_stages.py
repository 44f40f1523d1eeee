"""All stages end to end on configs/tiny.py, and what they refuse.

The quick chain runs on a teacher of two layers that stage pretrain makes; the slow one on the
packaged teacher with Mamba-2.
"""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import transformers

from configs import tiny
from mil_jax import sharding
from mil_jax.checkpoint import hf_import, models, orbax_io
from mil_jax.config import ModelConfig, RunConfig, from_config_dict
from mil_jax.data import sources
from mil_jax.data.chat import encode_chat, encode_prompt, load_tokenizer
from mil_jax.data.records import RecordSource, read_manifest
from mil_jax.errors import UserError
from mil_jax.generate import draft_vocab
from mil_jax.train import stages
from mil_jax.train.loop import Loop, read_metrics
from mil_jax.train.stages import run_stage
from mil_jax.train.workdir import Workdir

from .conftest import mesh_of

CHAIN = ("pseudo_labels", "distill", "sft", "dpo", "draft")
ARCHITECTURE = ModelConfig(
    vocab_size=512,
    d_model=32,
    layer_types=("attention",) * 2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    d_ff=48,
    tie_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(5,),
    pad_token_id=0,
)


@pytest.fixture(autouse=True, scope="module")
def one_cpu():
    """A machine with one device: eight would do the same work eight times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *sizes: mesh_of(1, 1, 1))
        yield


def config_of(stage, teacher="demo_teacher", mixer="mamba", **changes):
    """Returns the tiny config with dotted keys changed (`__` stands for a dot)."""
    values = tiny.get_config(f"stage={stage},mixer={mixer}")
    values.teacher = str(teacher)
    if teacher != "demo_teacher":
        values.conversion.steps = ((0,), (0, 1))
        values.data.evaluation = "demo:test:0:4"
        values.stage.length = 64
        values.stage.max_prompt_length = 48
    for key, value in changes.items():
        *path, last = key.split("__")
        node = values
        for name in path:
            node = node[name]
        with node.ignore_type():
            node[last] = value
    return from_config_dict(RunConfig, values.to_dict())


@dataclasses.dataclass
class Chain:
    """What the stages made.

    Attributes:
        path: The workdir.
        teacher: Folder of the teacher.
        starts: By training run, the model that it began with.
    """

    path: object
    teacher: object
    starts: dict

    def load(self, name):
        return orbax_io.load_model(self.path / name / "model")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Runs every stage once."""
    root = tmp_path_factory.mktemp("chain")
    starts = {}
    train = stages._train

    def spy(run, name, folder, start, *rest):
        starts[name] = start
        return train(run, name, folder, start, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_train", spy)
        teacher = run_stage(_pretrain_config(), root / "teacher")
        for stage in (*CHAIN, "export", "evaluate"):
            run_stage(config_of(stage, teacher), root / "work")
    return Chain(root / "work", teacher, starts)


def _pretrain_config(**changes):
    kwargs = {
        "tokenizer": "demo_teacher",
        "architecture": dataclasses.asdict(ARCHITECTURE),
        "stage__name": "pretrain",
        "stage__loss_on": "all",
    }
    return config_of("sft", "", **(kwargs | changes))


def _same(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b)


class TestChain:
    def test_pretrain_made_a_teacher(self, chain):
        config, params = orbax_io.load_model(chain.teacher)
        assert config == ARCHITECTURE
        moved = chain.starts["pretrain"].params
        assert all(not _same(np.asarray(moved[n]), v) for n, v in params.items())

    def test_pseudo_labels_answer_the_prompts(self, chain):
        records = RecordSource(chain.path / "pseudo_labels" / "data")
        prompts = sources.prompts("demo:train:0:16")
        tokenizer = load_tokenizer(models.resolve("demo_teacher"))
        assert len(records) == len(prompts) == 16
        for record, chat in zip(records, prompts, strict=True):
            prompt = encode_prompt(tokenizer, chat)
            np.testing.assert_array_equal(record.tokens[: prompt.size], prompt)
            np.testing.assert_array_equal(
                record.loss_mask, np.arange(record.tokens.size) >= prompt.size
            )
            assert 1 <= record.loss_mask.sum() <= 8

    def test_distillation_is_stepwise(self, chain):
        """Each step's model has more Mamba layers and starts from the one before."""
        _, teacher = orbax_io.load_model(chain.teacher)
        config, first = chain.load("distill/step_0")
        assert config.layer_types == ("mamba", "attention")
        start = chain.starts["distill"]
        assert start.config.layer_types == ("mamba", "mamba")
        kept = {name for name in start.params if not name.startswith("layers.1.mamba")}
        assert all(_same(np.asarray(start.params[name]), first[name]) for name in kept)
        # The new layer comes from the attention of step 0's model.
        np.testing.assert_array_equal(
            start.params["layers.1.mamba.x_proj.kernel"],
            first["layers.1.attn.v_proj.kernel"],
        )
        assert chain.load("distill")[0].layer_types == ("mamba", "mamba")
        start = chain.starts["distill/step_0"]
        for name, value in start.params.items():
            if "mamba" not in name:
                assert _same(np.asarray(value), teacher[name]), name

    def test_distillation_trains_the_new_mixers_alone(self, chain):
        assert config_of("distill").stage.trainable == "mamba"
        for name in ("distill/step_0", "distill"):
            _, after = chain.load(name)
            for weight, value in chain.starts[name].params.items():
                is_frozen = ".mamba." not in weight
                assert _same(np.asarray(value), after[weight]) == is_frozen, weight

    @pytest.mark.parametrize(
        ("stage", "before"), [("sft", "distill"), ("dpo", "sft"), ("draft", None)]
    )
    def test_later_stages_continue_and_train_all(self, chain, stage, before):
        start = chain.starts[stage]
        if before:
            config, params = chain.load(before)
            assert start.config == config
            assert all(_same(start.params[n], value) for n, value in params.items())
        config, after = chain.load(stage)
        assert config == start.config
        assert set(after) == set(start.params)
        for name, value in start.params.items():
            assert not _same(np.asarray(value), after[name]), name

    def test_draft_is_cut_from_the_teacher(self, chain):
        start = chain.starts["draft"]
        assert start.config.layer_types == ("attention",)
        _, teacher = orbax_io.load_model(chain.teacher)
        assert set(start.params) < set(teacher)
        assert all(_same(value, teacher[name]) for name, value in start.params.items())

    def test_every_training_logs_finite_numbers(self, chain):
        for name in ("distill/step_0", "distill", "sft", "dpo", "draft"):
            rows = read_metrics(chain.path / name / "metrics.csv")
            assert [row["step"] for row in rows] == [0, 1]
            assert all(np.isfinite(list(row.values())).all() for row in rows)
            has_kl = name.startswith("distill")
            assert ("kl" in rows[0]) == has_kl and ("margin" in rows[0]) == (
                name == "dpo"
            )

    def test_sft_data_is_the_chats(self, chain):
        records = RecordSource(chain.path / "sft" / "data")
        chats = sources.conversations("demo:train:16:16")
        tokenizer = load_tokenizer(models.resolve("demo_teacher"))
        for record, chat in zip(records, chats, strict=True):
            expected = encode_chat(tokenizer, chat)
            np.testing.assert_array_equal(record.tokens, expected.tokens)
            np.testing.assert_array_equal(record.loss_mask, expected.loss_mask)

    def test_tokenizer_travels_along(self, chain):
        for name in ("distill/model", "dpo/model", "draft/model", "export"):
            assert len(load_tokenizer(chain.path / name)) == 512

    def test_export_holds_the_newest_model(self, chain):
        exported = hf_import.load(chain.path / "export")
        config, params = chain.load("dpo")
        assert exported.config.layer_types == config.layer_types
        assert set(exported.params) == set(params)
        assert all(_same(exported.params[n], value) for n, value in params.items())

    def test_evaluate_writes_scores(self, chain):
        scores = json.loads((chain.path / "evaluate" / "scores.json").read_text())
        assert scores["model"] == str(chain.path / "dpo" / "model")
        assert scores["data"] == "demo:test:0:4" and scores["count"] == 4
        assert 0 <= scores["exact_match"] <= 1 and 1 < scores["ppl"] < 1e4


def _contents(path):
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.stat().st_size)
        for file in path.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def no_work(monkeypatch):
    """Any training or generation is an error."""

    def fail(*args, **kwargs):
        raise AssertionError("work was done again")

    monkeypatch.setattr(Loop, "run", fail)
    monkeypatch.setattr("mil_jax.data.pseudo_labels.generate", fail)


class TestAgain:
    @pytest.mark.parametrize("stage", CHAIN)
    def test_finished_stages_are_left_alone(self, chain, no_work, stage):
        before = _contents(chain.path)
        path = run_stage(config_of(stage, chain.teacher), chain.path)
        assert _contents(chain.path) == before
        assert path == chain.path / stage / (
            "data" if stage == "pseudo_labels" else "model"
        )

    def test_a_finished_teacher_is_left_alone(self, chain, no_work):
        assert run_stage(_pretrain_config(), chain.teacher.parents[1]) == chain.teacher

    def test_what_does_not_change_the_result_may_differ(self, chain, no_work):
        config = config_of(
            "sft",
            chain.teacher,
            compute__remat=True,
            compute__scan_layers=False,
            stage__checkpoint_every=7,
            stage__loss_chunk=9,
            mesh__data=2,
        )
        run_stage(config, chain.path)

    @pytest.mark.parametrize(
        ("key", "old", "new"),
        [
            ("seed", 0, 1),
            ("stage.optimizer.lr", 2e-4, 2e-3),
            ("stage.batch_size", 4, 8),
            ("data.conversations", "demo:train:16:16", "demo:train:0:9"),
        ],
    )
    def test_another_config_is_refused(self, chain, no_work, key, old, new):
        config = config_of("sft", chain.teacher, **{key.replace(".", "__"): new})
        before = _contents(chain.path)
        with pytest.raises(UserError) as error:
            run_stage(config, chain.path)
        assert f"another config: {key} was {old!r}, now {new!r}" in str(error.value)
        assert str(chain.path / "sft") in str(error.value)
        assert _contents(chain.path) == before

    @pytest.mark.parametrize(
        ("key", "value"), [("implementation", "pallas_triton"), ("attention", "cudnn")]
    )
    def test_what_needs_another_device(self, tmp_path, key, value):
        config = config_of("sft", **{f"compute__{key}": value})
        with pytest.raises(UserError) as error:
            run_stage(config, tmp_path)
        assert str(error.value) == (
            f"compute.{key} is {value!r}, which needs an NVIDIA GPU, and this is a cpu; "
            "auto takes what runs here"
        )

    def test_export_is_not_overwritten(self, chain, tmp_path):
        """Again it is left as it is; a newer model is not written over it."""
        work = shutil.copytree(chain.path, tmp_path / "work")
        before = _contents(work / "export")
        config = config_of("export", chain.teacher)
        assert run_stage(config, work) == work / "export"
        later = (work / "export").stat().st_mtime + 10
        os.utime(work / "dpo" / "model", (later, later))
        with pytest.raises(UserError, match="export is older than .*model; remove it"):
            run_stage(config, work)
        assert _contents(work / "export") == before

    def test_labels_of_another_teacher_or_of_other_prompts_are_refused(
        self, chain, tmp_path
    ):
        work = shutil.copytree(chain.path, tmp_path / "work")
        shutil.rmtree(work / "distill")
        for teacher, change, name in (
            (chain.teacher, {"data__prompts": "demo:train:0:3"}, "data.prompts"),
            ("elsewhere", {}, "teacher"),
        ):
            config = config_of("distill", teacher, **change)
            with pytest.raises(
                UserError, match=f"labels of another config: {name} was"
            ):
                run_stage(config, work)

    @pytest.mark.parametrize("stage", ["pseudo_labels", "distill"])
    def test_a_layer_out_of_range_is_found_first(self, chain, tmp_path, stage):
        steps = ((0,), (0, 99))
        config = config_of(stage, chain.teacher, conversion__steps=steps)
        if stage == "distill":
            shutil.copytree(chain.path / "pseudo_labels", tmp_path / "pseudo_labels")
        with pytest.raises(UserError, match=r"conversion.steps\[1\]: .*holds 99"):
            run_stage(config, tmp_path)
        assert not list(tmp_path.rglob("metrics.csv"))

    def test_a_failed_first_row_binds_the_folder_to_nothing(self, chain, tmp_path):
        rows = tmp_path / "rows.jsonl"
        rows.write_text("not JSON\n")
        config = config_of("pseudo_labels", chain.teacher, data__prompts=str(rows))
        with pytest.raises(UserError):
            run_stage(config, tmp_path / "work")
        assert (tmp_path / "work/pseudo_labels/data/manifest.json").exists()
        rows = tmp_path / "right.jsonl"
        rows.write_text('{"prompt": "Add 1 and 2."}\n')
        config = config_of("pseudo_labels", chain.teacher, data__prompts=str(rows))
        run_stage(config, tmp_path / "work")
        assert len(RecordSource(tmp_path / "work/pseudo_labels/data")) == 1

    def test_unfinished_stage_goes_on(self, chain, tmp_path, monkeypatch):
        """The model of a finished run is missing: it is saved again from the checkpoint."""
        work = shutil.copytree(chain.path, tmp_path / "work")
        shutil.rmtree(work / "sft" / "model")
        monkeypatch.setattr(stages, "make_train_step", lambda *a, **k: None)
        path = run_stage(config_of("sft", chain.teacher), work)
        _, expected = chain.load("sft")
        _, found = orbax_io.load_model(path)
        assert all(_same(found[name], value) for name, value in expected.items())


class TestReferences:
    @pytest.mark.parametrize("reference", ["teacher", "start"])
    def test_of_preferences(self, chain, reference):
        config = config_of("dpo", chain.teacher, stage__reference=reference)
        run = stages.Run(config, Workdir(chain.path), mesh_of(1, 1, 1))
        blueprint, weights = stages._teacher(run, chain.starts["dpo"])
        params = blueprint.unstack(weights)
        expected = {
            "teacher": orbax_io.load_model(chain.teacher)[1],
            "start": chain.starts["dpo"].params,
        }[reference]
        assert set(params) == set(expected)
        assert all(_same(np.asarray(params[n]), v) for n, v in expected.items())

    def test_other_vocabulary(self, chain):
        start = chain.starts["sft"]
        odd = dataclasses.replace(start.config, vocab_size=500)
        config = config_of("sft", chain.teacher, stage__kl_weight=1.0)
        run = stages.Run(config, Workdir(chain.path), mesh_of(1, 1, 1))
        with pytest.raises(
            UserError, match="teacher has 512 tokens and the student 500"
        ):
            stages._teacher(run, dataclasses.replace(start, config=odd))


def test_model_has_its_tokenizer_before_its_name(tmp_path, monkeypatch):
    """A kill while the configured tokenizer is written leaves no model without one."""
    monkeypatch.setattr(Loop, "run", lambda self, state, *weights: state)
    model = tmp_path / "pretrain" / "model"

    def killed(self, folder, **_):
        assert folder != model
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stage(_pretrain_config(), tmp_path)
    assert not model.exists()
    assert run_stage(_pretrain_config(), tmp_path) == model
    assert len(load_tokenizer(model)) == 512


class TestDraft:
    """What stage draft can start from, learn from and propose."""

    @pytest.fixture
    def train(self, monkeypatch):
        """Notes what would be trained on what."""
        calls = []

        def train(run, name, folder, start, data, tokenizer, add=None):
            calls.append((start, data, stages._teacher(run, start)))
            path = folder / "model"
            path.mkdir(exist_ok=True)
            return path

        monkeypatch.setattr(stages, "_train", train)
        return calls

    def test_evenly_spaced_layers_of_any_model(self, chain, tmp_path, train):
        """Here of the hybrid that a stage made."""
        hybrid = chain.path / "distill" / "step_0" / "model"
        changes = {"draft_layers": (), "draft_depth": 1, "start_from": str(hybrid)}
        changes = {f"stage__{key}": value for key, value in changes.items()}
        run_stage(config_of("draft", chain.teacher, **changes), tmp_path)
        ((start, _, teacher),) = train
        assert start.config.layer_types == ("mamba",)
        assert teacher == (None, None)
        _, params = chain.load("distill/step_0")
        assert "layers.0.mamba.x_proj.kernel" in start.params
        assert all(_same(value, params[name]) for name, value in start.params.items())

    def test_of_an_export(self, chain, tmp_path, train):
        config = config_of("draft", chain.path / "export")
        run_stage(config, tmp_path)
        assert train[0][0].config.layer_types == ("mamba",)

    @pytest.mark.parametrize("target", ["", "dpo"])
    def test_divergence_is_from_the_target(self, chain, tmp_path, train, target):
        """Without one, from the model that the draft is cut from."""
        folder = str(chain.path / target / "model") if target else ""
        changes = {"stage__kl_weight": 1.0, "stage__target": folder}
        run_stage(config_of("draft", chain.teacher, **changes), tmp_path)
        ((start, _, (blueprint, weights)),) = train
        expected = orbax_io.load_model(
            chain.path / "dpo" / "model" if target else chain.teacher
        )[1]
        found = blueprint.unstack(weights)
        assert set(found) == set(expected)
        assert all(_same(np.asarray(found[n]), v) for n, v in expected.items())
        assert start.config.layer_types == ("attention",)

    def test_trains_towards_the_target(self, chain, tmp_path):
        changes = {
            "stage__kl_weight": 1.0,
            "stage__ce_weight": 0.0,
            "stage__target": str(chain.path / "dpo" / "model"),
            "stage__records": "pseudo_labels",
            "data__labels": str(chain.path / "pseudo_labels" / "data"),
            "stage__draft_vocab_size": 40,
        }
        path = run_stage(config_of("draft", chain.teacher, **changes), tmp_path)
        rows = read_metrics(tmp_path / "draft" / "metrics.csv")
        assert all(row["loss"] == pytest.approx(row["kl"]) for row in rows)
        # The commonest tokens of the answers, beside the model; EOS always.
        records = RecordSource(chain.path / "pseudo_labels" / "data")
        answers = np.concatenate([r.tokens[r.loss_mask] for r in records])
        counts = np.bincount(answers, minlength=512)
        ids = draft_vocab.load(path)
        assert len(ids) == 40 and 5 in ids
        others = np.setdiff1d(np.arange(512), ids)
        assert counts[np.setdiff1d(ids, [5])].min() >= counts[others].max()
        # A finished draft gets them again if they are lost.
        (path / draft_vocab.FILE).unlink()
        run_stage(config_of("draft", chain.teacher, **changes), tmp_path)
        np.testing.assert_array_equal(draft_vocab.load(path), ids)

    def test_edited_data(self, tmp_path, train):
        """Under the same name, at the same size."""
        file = tmp_path / "chats.jsonl"
        lines = [json.dumps({"prompt": "hi", "completion": "you"})] * 8
        file.write_text("\n".join(lines))
        config = config_of("draft", data__conversations=str(file))
        run_stage(config, tmp_path)
        run_stage(config, tmp_path)
        file.write_text("\n".join(lines).replace("you", "she"))
        with pytest.raises(
            UserError, match="chats.jsonl has changed since .*draft/data"
        ):
            run_stage(config, tmp_path)
        assert len(train) == 2

    def test_on_the_targets_own_answers(self, chain, tmp_path, train):
        """A hybrid takes the teacher's place in a workdir of its own."""
        target = chain.path / "dpo" / "model"
        data = run_stage(config_of("pseudo_labels", target), tmp_path)
        config = config_of(
            "draft",
            target,
            stage__records="pseudo_labels",
            stage__start_from=str(chain.teacher),
        )
        run_stage(config, tmp_path)
        ((start, records, _),) = train
        assert start.config.layer_types == ("attention",)
        assert records.manifest == RecordSource(data).manifest

    def test_without_a_reduced_vocabulary(self, chain):
        assert draft_vocab.load(chain.path / "draft" / "model") is None

    def test_target_of_another_vocabulary(self, chain, tmp_path, no_work):
        other = tmp_path / "other"
        shutil.copytree(chain.path / "dpo" / "model", other)
        file = other / "model_config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"vocab_size": 500}))
        config = config_of("draft", chain.teacher, stage__target=str(other))
        with pytest.raises(
            UserError, match="the target has 500 tokens and the draft's source 512"
        ):
            run_stage(config, tmp_path / "work")

    @pytest.mark.parametrize("who", ["teacher", "target", "start_from", "other"])
    def test_labels_are_of_a_model_that_it_knows(self, chain, tmp_path, train, who):
        labels = tmp_path / "labels"
        shutil.copytree(chain.path / "pseudo_labels", labels)
        note = labels / "config.json"
        answered = str(chain.path / "dpo" / "model")
        if who != "teacher":
            values = json.loads(note.read_text()) | {"teacher": answered}
            note.write_text(json.dumps(values))
        changes = {"data__labels": str(labels / "data")}
        changes |= {"stage__records": "pseudo_labels"}
        if who in ("target", "start_from"):
            changes[f"stage__{who}"] = answered
        config = config_of("draft", chain.teacher, **changes)
        if who == "other":
            with pytest.raises(
                UserError, match="labels of another config: teacher was"
            ):
                run_stage(config, tmp_path / "work")
        else:
            run_stage(config, tmp_path / "work")
            assert len(train[0][1]) == 16

    def test_missing_labels_are_named(self, chain, tmp_path, no_work):
        changes = {"stage__records": "pseudo_labels", "data__labels": "/nope"}
        with pytest.raises(UserError, match="trains on /nope, which is not there"):
            run_stage(config_of("draft", chain.teacher, **changes), tmp_path)


class TestRefused:
    @pytest.mark.parametrize(
        ("stage", "message"),
        [
            ("distill", "which is not there: run stage=pseudo_labels first"),
            ("sft", "stage sft continues stage distill, which has not finished in"),
            ("dpo", "stage dpo continues stage sft, which has not finished in"),
            ("export", "holds no finished model; run a stage first or set"),
            ("evaluate", "holds no finished model; run a stage first or set"),
        ],
    )
    def test_stage_before_is_missing(self, tmp_path, no_work, stage, message):
        with pytest.raises(UserError) as error:
            run_stage(config_of(stage), tmp_path)
        assert message in str(error.value) and "\n" not in str(error.value)

    def test_step_0_is_not_the_finished_stage(self, chain, tmp_path):
        shutil.copytree(chain.path / "distill", tmp_path / "distill")
        shutil.rmtree(tmp_path / "distill" / "model")
        with pytest.raises(UserError, match="distill, which has not finished"):
            run_stage(config_of("sft", chain.teacher), tmp_path)

    def test_unfinished_labels(self, chain, tmp_path):
        labels = tmp_path / "pseudo_labels" / "data"
        shutil.copytree(chain.path / "pseudo_labels" / "data", labels)
        manifest = labels / "manifest.json"
        manifest.write_text(manifest.read_text().replace("true", "false"))
        assert not read_manifest(labels).complete
        with pytest.raises(UserError, match="is incomplete .* run its writer again"):
            run_stage(config_of("distill", chain.teacher), tmp_path)

    @pytest.mark.parametrize(
        ("stage", "changes", "message"),
        [
            ("pseudo_labels", {"data__prompts": ""}, "needs data.prompts in the"),
            ("draft", {"data__conversations": ""}, "needs data.conversations in"),
            ("draft", {"stage__draft_layers": ()}, "stage.draft_depth is 0, but the"),
            (
                "draft",
                {"stage__draft_layers": (), "stage__draft_depth": 3},
                "stage.draft_depth is 3, but the model has 2 layers; keep 1 to 2",
            ),
            ("draft", {"stage__draft_layers": (0, 2)}, "layers 0 to 1"),
            ("draft", {"stage__draft_layers": (0, 0)}, "(0, 0) names a layer twice"),
            (
                "draft",
                {"stage__draft_vocab_size": 513},
                "stage.draft_vocab_size is 513, but the model has 512 tokens",
            ),
            ("draft", {"stage__target": "/nope"}, "'/nope'"),
            (
                "draft",
                {"stage__records": "pseudo_labels"},
                "stage draft trains on",
            ),
            ("draft", {"stage__trainable": "mamba"}, "has no such weights"),
            ("draft", {"stage__batch_size": 1000}, "do not fill one batch of 1000"),
            ("draft", {"stage__start_from": "/nope"}, "'/nope'"),
        ],
    )
    def test_wrong_values(self, chain, tmp_path, no_work, stage, changes, message):
        with pytest.raises(UserError) as error:
            run_stage(config_of(stage, chain.teacher, **changes), tmp_path)
        assert message in str(error.value) and "\n" not in str(error.value)

    def test_no_conversion_steps(self, chain, tmp_path):
        shutil.copytree(chain.path / "pseudo_labels", tmp_path / "pseudo_labels")
        config = config_of("distill", chain.teacher, conversion__steps=())
        with pytest.raises(UserError, match="conversion.steps is empty"):
            run_stage(config, tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architecture": None}, "needs `architecture`"),
            ({"tokenizer": ""}, "needs `tokenizer`"),
            ({"architecture__vocab_size": 300}, "vocab_size is 300; the tokenizer has"),
        ],
    )
    def test_pretrain_without_its_inputs(self, tmp_path, no_work, changes, message):
        with pytest.raises(UserError, match=message):
            run_stage(_pretrain_config(**changes), tmp_path)

    def test_mended_mistake_may_be_tried_again(self, chain, tmp_path, no_work):
        """A stage that failed before it made anything claims nothing."""
        with pytest.raises(UserError, match="no such folder"):
            run_stage(config_of("pseudo_labels", "/nope"), tmp_path)
        with pytest.raises(AssertionError, match="work was done"):
            run_stage(config_of("pseudo_labels", chain.teacher), tmp_path)
        # Still without a record: the folder belongs to no config.
        with pytest.raises(UserError, match="no such folder"):
            run_stage(config_of("pseudo_labels", "/nope"), tmp_path)

    def test_damaged_note_of_the_config(self, chain, tmp_path):
        shutil.copytree(chain.path / "sft", tmp_path / "sft")
        (tmp_path / "sft" / "config.json").write_text("{")
        with pytest.raises(
            UserError, match="config.json is damaged; delete the folder"
        ):
            run_stage(config_of("sft", chain.teacher), tmp_path)

    def test_workdir_that_cannot_be_made(self, tmp_path):
        file = tmp_path / "file"
        file.write_text("")
        with pytest.raises(
            UserError, match="cannot be made .* choose another --workdir"
        ):
            run_stage(config_of("sft"), file)


@pytest.mark.slow
class TestPackagedTeacher:
    @pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
    def test_whole_chain(self, tmp_path, mixer):
        for stage in (*CHAIN, "export", "evaluate"):
            run_stage(config_of(stage, mixer=mixer), tmp_path)
        assert hf_import.load(tmp_path / "export").config.layer_types == (
            (mixer, "attention", mixer) + ("attention",) * 5
        )
        scores = json.loads((tmp_path / "evaluate" / "scores.json").read_text())
        assert scores["count"] == 8 and np.isfinite(scores["ppl"])
