"""Every file in configs/: each stage is a valid run, and its model has the known size."""

import dataclasses
import importlib.util
import math
import shlex
from pathlib import Path

import ml_collections
import pytest

from configs import demo_teacher
from mil_jax import surgery
from mil_jax.checkpoint import models
from mil_jax.config import (
    ComputeConfig,
    ModelConfig,
    RunConfig,
    SSMConfig,
    from_config_dict,
)
from mil_jax.errors import UserError
from mil_jax.models.decoder import Blueprint
from mil_jax.shapes import SHAPES
from mil_jax.train.stages import STAGES
from mil_jax.train.state import TRAINABLE

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(p for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "base"))
RECIPE = ("pseudo_labels", "distill", "sft", "dpo", "draft", "export", "evaluate")
# The architecture that a config's teacher has.
TEACHERS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3_8b",
    "HuggingFaceH4/zephyr-7b-beta": "zephyr_7b",
}


def _module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _stages(path):
    own = getattr(_module(path), "STAGES", None)
    return tuple(own) if own else RECIPE


CASES = [
    pytest.param(path, stage, id=f"{path.stem}-{stage}")
    for path in FILES
    for stage in _stages(path)
]


def _config(path, arg):
    return from_config_dict(RunConfig, _module(path).get_config(arg).to_dict())


def _hybrid(teacher, conversion, step):
    """Returns the architecture after a conversion step, sizes by the rules of the spec."""
    kinds = [
        conversion.mixer if i in step else kind
        for i, kind in enumerate(teacher.layer_types)
    ]
    is_mamba2 = conversion.mixer == "mamba2"
    ssm = SSMConfig(
        d_state=teacher.head_dim if is_mamba2 else conversion.d_state,
        dt_rank=math.ceil(teacher.d_model / 16),
        d_inner=teacher.n_heads * teacher.head_dim,
        d_xb=teacher.n_kv_heads * teacher.head_dim,
    )
    return dataclasses.replace(teacher, layer_types=tuple(kinds), ssm=ssm)


def _count(config, **compute):
    blueprint = Blueprint.create(config, ComputeConfig(**compute))
    return sum(math.prod(leaf.shape) for leaf in blueprint.abstract().values())


class TestStages:
    @pytest.mark.parametrize(("path", "stage"), CASES)
    def test_is_a_valid_run(self, path, stage):
        config = _config(path, f"stage={stage}")
        assert config.stage.name == stage
        assert stage in STAGES
        if stage in ("distill", "sft", "dpo", "draft", "pretrain"):
            assert 0 < config.stage.optimizer.lr < 0.1
            assert config.stage.trainable in TRAINABLE
        if stage != "draft":
            assert (config.stage.kl_weight > 0) == (stage == "distill")

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_unknown_stage_and_argument(self, path):
        module = _module(path)
        with pytest.raises(UserError, match="unknown stage 'nope'; this config has"):
            module.get_config("stage=nope")
        with pytest.raises(
            UserError, match="unknown config argument 'nope'; known: st"
        ):
            module.get_config("nope=1")

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_default_stage(self, path):
        config = _module(path).get_config()
        assert isinstance(config, ml_collections.ConfigDict)
        assert config.stage.name in ("distill", "pretrain")

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_the_command_in_the_docstring_is_this_file(self, path):
        text = _module(path).__doc__.replace("\\\n", " ")
        commands = [line for line in text.splitlines() if line.startswith("python -m")]
        assert commands
        for command in commands:
            words = shlex.split(command)
            (flag,) = [word for word in words if word.startswith("--config=")]
            name, _, arg = flag.removeprefix("--config=").partition(":")
            assert name == f"configs/{path.name}"
            _module(path).get_config(arg)


class TestRecipe:
    """The paper's numbers (Sec. 3 and its appendix)."""

    PAPER = [p for p in FILES if p.stem.endswith("_50")]

    @pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
    def test_half_of_the_layers_stepwise(self, path):
        steps = _config(path, "stage=distill").conversion.steps
        assert steps[0] == (0, 4, 8, 12, 16, 20, 24, 28)
        assert steps[-1] == tuple(range(0, 32, 2))

    @pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
    def test_training(self, path):
        stage = _config(path, "stage=distill").stage
        optimizer = stage.optimizer
        assert (optimizer.lr, optimizer.warmup_steps) == (8e-5, 500)
        assert (optimizer.b1, optimizer.b2, optimizer.clip_norm) == (0.9, 0.98, 0.1)
        assert (stage.batch_size, stage.length, stage.epochs) == (64, 2048, 1)
        assert (stage.ce_weight, stage.kl_weight) == (1.0, 0.1)
        assert stage.trainable == "mamba"
        stage = _config(path, "stage=sft").stage
        assert (stage.optimizer.lr, stage.optimizer.warmup_fraction) == (2e-5, 0.01)
        assert stage.packed and stage.trainable == "all"
        stage = _config(path, "stage=dpo").stage
        assert (stage.optimizer.lr, stage.optimizer.warmup_fraction) == (5e-7, 0.1)
        assert (stage.dpo_beta, stage.length, stage.max_prompt_length) == (
            0.01,
            1024,
            512,
        )
        assert stage.reference == "teacher"
        stage = _config(path, "stage=draft").stage
        assert stage.draft_layers == () and stage.epochs == 3
        assert surgery.spaced_layers(32, stage.draft_depth) == (0, 31)
        assert (stage.kl_weight, stage.records) == (0.0, "conversations")

    def test_mixers(self):
        mixers = {
            path.stem: _config(path, "stage=distill").conversion.mixer
            for path in self.PAPER
        }
        assert mixers["llama3_8b_mamba_50"] == "mamba"
        assert mixers["llama3_8b_mamba2_50"] == "mamba2"
        assert mixers["zephyr_7b_mamba_50"] == "mamba"


class TestModels:
    @pytest.mark.parametrize(
        ("path", "step"),
        [
            pytest.param(path, step, id=f"{path.stem}-{step}")
            for path in TestRecipe.PAPER
            for step in (0, 1)
        ],
    )
    def test_student_is_built_abstractly(self, path, step):
        config = _config(path, "stage=distill")
        teacher = SHAPES[TEACHERS[config.teacher]]
        hybrid = _hybrid(teacher, config.conversion, config.conversion.steps[step])
        scanned = dataclasses.replace(config.compute, scan_layers=True)
        blueprint = Blueprint.create(hybrid, scanned)
        # 75% attention has a period of four layers and 50% one of two.
        assert blueprint.period == (4, 2)[step]
        weights = blueprint.abstract()
        mixer = config.conversion.mixer
        assert weights[f"layers.0::{(4, 2)[step]}.{mixer}.x_proj.kernel"].shape == (
            (8, 16)[step],
            4096,
            1024,
        )
        # Projections keep the teacher's number of weights; a gate, dt, conv and A are new.
        added = _count(hybrid) - _count(teacher)
        per_layer = {
            "mamba": 4096 * 4096 + 2 * 4096 * 256 + 4096 * (4 + 1 + 1 + 16 + 1),
            "mamba2": 4096 * 4096 + 4096 * 32 + 6144 * (4 + 1) + 3 * 32 + 4096,
        }[mixer]
        assert added == per_layer * len(config.conversion.steps[step])

    @pytest.mark.parametrize(
        ("shape", "billions"),
        [
            ("llama3_8b", 8.030),
            ("llama3_1_8b", 8.030),
            ("llama3_2_1b", 1.236),
            ("zephyr_7b", 7.242),
            ("mamba_2_8b", 2.768),
            ("mamba_130m", 0.1291),
        ],
    )
    def test_number_of_parameters(self, shape, billions):
        """As published."""
        assert _count(SHAPES[shape]) / 1e9 == pytest.approx(billions, rel=1e-3)

    def test_stacking_does_not_change_the_number(self):
        count = _count(SHAPES["tiny"])
        assert count == _count(SHAPES["tiny"], scan_layers=False)

    def test_demo_teacher_is_its_architecture(self):
        loaded = models.load("demo_teacher").config
        expected = demo_teacher.ARCHITECTURE
        for name in ("vocab_size", "d_model", "layer_types", "head_dim", "d_ff"):
            assert getattr(loaded, name) == getattr(expected, name)
        assert _count(expected) == pytest.approx(3.2e6, rel=0.05)
        assert isinstance(expected, ModelConfig)

    @pytest.mark.parametrize("name", ["demo", "tiny"])
    def test_demo_steps_fit_its_teacher(self, name):
        (path,) = [p for p in FILES if p.stem == name]
        for mixer in ("mamba", "mamba2"):
            config = _config(path, f"stage=distill,mixer={mixer}")
            assert config.conversion.mixer == mixer
            assert max(config.conversion.steps[-1]) < 8
        assert max(_config(path, "stage=draft").stage.draft_layers) < 8


class TestAcceptance:
    """Models of the size that mil_jax.measure_acceptance trains."""

    PATH = FOLDER / "acceptance.py"

    @pytest.mark.parametrize(("world", "millions"), [("demo", 76), ("text", 64)])
    def test_the_teacher_is_of_middle_size(self, world, millions):
        config = _config(self.PATH, f"stage=pretrain,world={world}")
        assert round(_count(config.architecture) / 1e6) == millions
        assert config.stage.loss_on == "all"

    @pytest.mark.parametrize(("attention", "left"), [("50", 6), ("25", 3)])
    def test_attention_that_is_left(self, attention, left):
        config = _config(self.PATH, f"stage=distill,attention={attention}")
        (layers,) = config.conversion.steps
        assert len(layers) == 12 - left and 11 not in layers

    def test_the_rehearsal_is_short(self):
        stage = _config(self.PATH, "stage=draft,world=text,tiny").stage
        assert (stage.max_steps, stage.batch_size, stage.max_new_tokens) == (2, 4, 16)

    @pytest.mark.parametrize(
        ("arg", "message"),
        [
            ("world=moon", "world is 'moon'; this config has demo, text"),
            ("attention=75", "attention is '75'; this config has 50 and 25"),
        ],
    )
    def test_wrong_arguments(self, arg, message):
        with pytest.raises(UserError, match=message):
            _config(self.PATH, f"stage=distill,{arg}")
