"""The stages: each is data over one step, one loop and one generator.

pretrain                 a new model, cross-entropy
pseudo_labels            the teacher answers prompts
distill   (stage 1)      attention -> Mamba, then CE + KL on the teacher's answers (Eq. 2)
sft       (stage 2)      all weights, conversations
dpo       (stage 3)      preferences against the teacher (Eq. 4)
draft                    some layers of a model, fine-tuned to speculate for the target
export, evaluate         of the newest model
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grain
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mil_jax import disk, sharding, surgery
from mil_jax import evaluate as evaluation
from mil_jax.array_types import Params
from mil_jax.checkpoint import hf_export, models, orbax_io
from mil_jax.checkpoint.hf_import import Checkpoint
from mil_jax.config import ComputeConfig, ModelConfig, RunConfig
from mil_jax.data import pipeline, pseudo_labels, sources
from mil_jax.data.chat import (
    Example,
    Pair,
    Tokenizer,
    encode_chat,
    encode_pair,
    load_tokenizer,
)
from mil_jax.data.records import RecordSource, RecordWriter
from mil_jax.errors import UserError
from mil_jax.generate import draft_vocab
from mil_jax.generate.sampler import Sampling
from mil_jax.models import decoder
from mil_jax.models.decoder import Blueprint, HybridLM
from mil_jax.progress import progress
from mil_jax.train import state as state_lib
from mil_jax.train.loop import Loop
from mil_jax.train.step import (
    make_loss_fn,
    make_train_step,
    reference_compute,
)
from mil_jax.train.workdir import DATA, Workdir

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, where it works and on which devices."""

    config: RunConfig
    workdir: Workdir
    mesh: Mesh


def run_stage(config: RunConfig, workdir: str | Path) -> Path:
    """Runs the stage that `config` names; a finished one is left as it is.

    A stage that was stopped goes on from its newest checkpoint or shard.

    Args:
        config: From `configs/*.py`.
        workdir: Folder of all stages of one conversion.

    Returns:
        The folder of what the stage made.

    Raises:
        UserError: The config or its inputs are wrong, or the folder belongs to another one.
    """
    _check_device(config.compute)
    sizes = config.mesh
    mesh = sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    with Workdir(Path(workdir)) as folders:
        return STAGES[config.stage.name](Run(config, folders, mesh))


def _check_device(compute: ComputeConfig) -> None:
    """Finds an implementation that is not for this device before there is any work."""
    device = jax.default_backend()
    for key, value in (
        ("implementation", "pallas_triton"),
        ("attention", "cudnn"),
    ):
        if getattr(compute, key) == value and device != "gpu":
            raise UserError(
                f"compute.{key} is {value!r}, which needs an NVIDIA GPU, and this is a "
                f"{device}; auto takes what runs here"
            )


def _pretrain(run: Run) -> Path:
    """Trains `architecture` from a random start."""
    architecture = run.config.architecture
    if architecture is None:
        raise UserError("stage pretrain needs `architecture` in the config")
    if not run.config.tokenizer:
        raise UserError(
            "stage pretrain needs `tokenizer` in the config: a folder or id"
        )
    folder = run.workdir.claim("pretrain", run.config)
    if path := _finished(run, "pretrain"):
        return path
    tokenizer = load_tokenizer(models.resolve(run.config.tokenizer))
    if len(tokenizer) > architecture.vocab_size:
        raise UserError(
            f"architecture.vocab_size is {architecture.vocab_size}; the tokenizer has "
            f"{len(tokenizer)} tokens"
        )
    params = decoder.init_params(architecture, jax.random.key(run.config.seed))
    source = Checkpoint(
        architecture, params, Path(models.resolve(run.config.tokenizer))
    )
    data = _conversations(run, folder, tokenizer)
    return _train(run, "pretrain", folder, source, data, tokenizer)


def _pseudo_labels(run: Run) -> Path:
    """Writes the teacher's answers to `data.prompts`."""
    _check_one_process(run)
    config, stage = run.config, run.config.stage
    folder = run.workdir.claim("pseudo_labels", config)
    spec = _wanted(config.data.prompts, "prompts", "pseudo_labels")
    prompts = sources.prompts(spec)
    teacher = models.load(config.teacher)
    if not teacher.config.is_hybrid:  # A hybrid's answers are for its draft.
        _check_steps(run, teacher)
    tokenizer = _tokenizer(run, teacher)
    sampling = Sampling(stage.temperature, stage.top_k, stage.top_p)
    pseudo_labels.write(
        _for_generation(run, teacher),
        tokenizer,
        prompts,
        folder / DATA,
        fingerprint=json.dumps(
            [config.teacher, config.data.prompts, stage.max_new_tokens, stage.length]
            + [*dataclasses.astuple(sampling), config.seed]
        ),
        inputs=sources.digests(spec),
        batch_size=stage.batch_size,
        max_new_tokens=stage.max_new_tokens,
        max_length=stage.length,
        sampling=sampling,
        seed=config.seed,
    )
    return folder / DATA


def _distill(run: Run) -> Path:
    """Converts and trains step by step; every step starts from the last one's model."""
    config = run.config
    run.workdir.claim("distill", config)
    if path := _finished(run, "distill"):
        return path
    labels = run.workdir.labels(config)
    if not config.conversion.steps:
        raise UserError("conversion.steps is empty; name the layers to convert")
    data = RecordSource(labels)
    start = models.load(config.stage.start_from or config.teacher)
    _check_steps(run, start)
    tokenizer = _tokenizer(run, start)
    last = len(config.conversion.steps) - 1
    for i, layers in enumerate(config.conversion.steps):
        params, hybrid = _convert(run, start, layers)
        student = Checkpoint(hybrid, params, start.source)
        name = "distill" if i == last else f"distill/step_{i}"
        path = run.workdir.stage(name)
        path = _train(run, name, path, student, data, tokenizer)
        start = models.load(path) if i < last else start
    return path


def _check_one_process(run: Run) -> None:
    if jax.process_count() > 1:
        raise UserError(
            f"{run.config.stage.name} runs in one process: start it on one node, without "
            "--distributed"
        )


def _check_steps(run: Run, start: Checkpoint) -> None:
    """Finds a wrong layer before anything is answered or trained."""
    steps = run.config.conversion.steps
    for i, layers in enumerate(steps):
        try:
            surgery.check_layers(start.config, layers)
        except UserError as error:
            raise UserError(f"conversion.steps[{i}]: {error}") from None


def _convert(
    run: Run, start: Checkpoint, layers: Sequence[int]
) -> tuple[Params, ModelConfig]:
    conversion = run.config.conversion
    return surgery.attention_to_mamba(
        start.params,
        start.config,
        layers,
        mixer=conversion.mixer,
        init_from=conversion.init_from,
        channel_order=conversion.channel_order,
        dt_init=conversion.dt_init,
        d_state=conversion.d_state,
        seed=run.config.seed,
    )


def _sft(run: Run) -> Path:
    """Fine-tunes on conversations, with or without a teacher."""
    folder = run.workdir.claim("sft", run.config)
    start = models.load(run.workdir.start_of("sft", run.config.stage.start_from))
    tokenizer = _tokenizer(run, start)
    data = _conversations(run, folder, tokenizer)
    return _train(run, "sft", folder, start, data, tokenizer)


def _dpo(run: Run) -> Path:
    """Trains on preference pairs against the reference model."""
    folder = run.workdir.claim("dpo", run.config)
    start = models.load(run.workdir.start_of("dpo", run.config.stage.start_from))
    tokenizer = _tokenizer(run, start)
    spec = _wanted(run.config.data.preferences, "preferences", "dpo")
    pairs = sources.preference_pairs(spec)

    def encode(i: int) -> Pair:
        return encode_pair(tokenizer, *pairs[i])

    data = _records(
        run, folder, spec, "pair", map(encode, range(len(pairs))), len(pairs)
    )
    return _train(run, "dpo", folder, start, data, tokenizer)


def _draft(run: Run) -> Path:
    """Keeps some layers of a model and fine-tunes them ("shrink and fine-tune")."""
    config, stage = run.config, run.config.stage
    folder = run.workdir.claim("draft", config)
    path = _finished(run, "draft")
    if path and not (stage.draft_vocab_size and draft_vocab.load(path) is None):
        return path
    source = models.load(stage.start_from or config.teacher)
    if stage.draft_vocab_size > source.config.vocab_size:
        raise UserError(
            f"stage.draft_vocab_size is {stage.draft_vocab_size}, but the model has "
            f"{source.config.vocab_size} tokens; 0 takes all of them"
        )
    if stage.target:
        target = models.read_config(stage.target)[0]
        _check_vocabulary(target, source.config, "target", "draft's source")
    layers = stage.draft_layers or surgery.spaced_layers(
        source.config.n_layers, stage.draft_depth
    )
    params, shrunk = surgery.keep_layers(source.params, source.config, layers)
    start = Checkpoint(shrunk, params, source.source)
    tokenizer = _tokenizer(run, source)
    if stage.records == "pseudo_labels":
        data = RecordSource(run.workdir.labels(config))
    else:
        data = _conversations(run, folder, tokenizer)
    if not stage.draft_vocab_size:
        return _train(run, "draft", folder, start, data, tokenizer)
    add = functools.partial(_save_draft_vocab, run, data, shrunk)
    path = _train(run, "draft", folder, start, data, tokenizer, add)
    if jax.process_index() == 0 and draft_vocab.load(path) is None:
        add(path)  # Somebody removed it.
    return path


def _save_draft_vocab(
    run: Run, data: RecordSource, config: ModelConfig, path: Path
) -> None:
    """Stores beside the model the tokens that the draft may propose."""
    answers = (record.tokens[record.loss_mask] for record in data)
    counts = draft_vocab.count(answers, config.vocab_size)
    ids = draft_vocab.choose(
        counts, run.config.stage.draft_vocab_size, config.eos_token_ids
    )
    draft_vocab.save(path, ids)
    share = 100 * counts[ids].sum() / max(counts.sum(), 1)
    log.info("draft proposes %d tokens: %.2f%% of answers", len(ids), share)


def _export(run: Run) -> Path:
    """Writes the newest model as a Hugging Face folder."""
    _check_one_process(run)
    source = run.config.stage.start_from or run.workdir.newest()
    path = run.workdir.stage("export")
    if path.is_dir() and Path(source).is_dir():
        if path.stat().st_mtime >= Path(source).stat().st_mtime:
            log.info("export is finished: %s", path)
            return path
        raise UserError(
            f"{path} is older than {source}; remove it to export the newer model"
        )
    model = models.load(source)
    hf_export.save(path, model.config, model.params, assets_from=model.source)
    log.info("exported %s to %s", model.source, path)
    return path


def _evaluate(run: Run) -> Path:
    """Scores the newest model on `data.evaluation`."""
    _check_one_process(run)
    config = run.config
    path = config.stage.start_from or run.workdir.newest()
    model = models.load(path)
    tokenizer = _tokenizer(run, model)
    spec = _wanted(config.data.evaluation, "evaluation", "evaluate")
    scores = evaluation.evaluate(
        _for_generation(run, model),
        tokenizer,
        sources.conversations(spec),
        max_new_tokens=config.stage.max_new_tokens,
        batch_size=config.stage.batch_size,
    )
    folder = run.workdir.stage("evaluate")
    folder.mkdir(parents=True, exist_ok=True)
    result = {"model": str(path), "data": spec, **dataclasses.asdict(scores)}
    with disk.writing(folder):
        (folder / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    log.info("%s", result)
    return folder


STAGES: dict[str, Callable[[Run], Path]] = {
    "pretrain": _pretrain,
    "pseudo_labels": _pseudo_labels,
    "distill": _distill,
    "sft": _sft,
    "dpo": _dpo,
    "draft": _draft,
    "export": _export,
    "evaluate": _evaluate,
}


def _finished(run: Run, name: str) -> Path | None:
    """Returns the model of a training that has ended."""
    path = run.workdir.model(name)
    if not orbax_io.is_model_dir(path):
        return None
    log.info("%s is finished: %s", name, path)
    return path


def _train(
    run: Run,
    name: str,
    folder: Path,
    start: Checkpoint,
    data: RecordSource,
    tokenizer: Tokenizer,
    add: Callable[[Path], None] | None = None,
) -> Path:
    """Trains `start` as the stage says and saves the result; returns its folder.

    `add` writes what else belongs to the model, before its folder has its name.
    """
    if path := _finished(run, name):
        return path
    path = run.workdir.model(name)
    stage = run.config.stage
    dataset = _dataset(run, data, tokenizer)
    num_steps = min(len(dataset), stage.max_steps or len(dataset))
    blueprint = Blueprint.create(start.config, run.config.compute)
    teacher_blueprint, teacher = _teacher(run, start)
    optimizer = state_lib.make_optimizer(stage.optimizer, num_steps)
    state, frozen = state_lib.create(
        blueprint, start.params, stage.trainable, optimizer, run.mesh
    )
    if not state.trainable:
        raise UserError(
            f"stage.trainable is {stage.trainable!r}, but the model has no such weights"
        )
    step_fn = make_train_step(
        make_loss_fn(stage, blueprint, teacher_blueprint),
        optimizer,
        state_lib.make_schedule(stage.optimizer, num_steps),
        loss_on=stage.loss_on,
        accumulate=stage.accumulate,
        mesh=run.mesh,
        like=state,
    )
    loop = Loop(
        name=name,
        folder=folder,
        blueprint=blueprint,
        step_fn=step_fn,
        dataset=dataset,
        num_steps=num_steps,
        checkpoint_every=stage.checkpoint_every,
        mesh=run.mesh,
        data=data.digest(),
    )
    state = loop.run(state, frozen, teacher)
    weights = {
        key: value.astype(blueprint.storage_dtype(key))
        for key, value in (frozen | state.trainable).items()
    }

    def complete(folder: Path) -> None:
        if run.config.tokenizer:  # The one that the model was trained with.
            tokenizer.save_pretrained(folder)
        if add is not None:
            add(folder)

    orbax_io.save_model(
        path,
        start.config,
        blueprint.unstack(weights),
        assets_from=start.source,
        add=complete,
    )
    return path


def _teacher(
    run: Run, start: Checkpoint
) -> tuple[Blueprint | None, state_lib.Weights | None]:
    """Returns the model of the KL term or DPO's reference, where the stage has one."""
    stage = run.config.stage
    if stage.name == "dpo" and stage.reference == "start":
        teacher = start
    elif stage.name == "draft" and stage.kl_weight:
        teacher = models.load(stage.target or stage.start_from or run.config.teacher)
    elif stage.name == "dpo" or stage.kl_weight:
        teacher = models.load(run.config.teacher)
    else:
        return None, None
    _check_vocabulary(teacher.config, start.config, "teacher", "student")
    compute = reference_compute(run.config.compute, run.mesh)
    blueprint = Blueprint.create(teacher.config, compute)
    return blueprint, blueprint.place(teacher.params, run.mesh)


def _check_vocabulary(a: ModelConfig, b: ModelConfig, name: str, other: str) -> None:
    if a.vocab_size != b.vocab_size:
        raise UserError(
            f"the {name} has {a.vocab_size} tokens and the {other} {b.vocab_size}; both "
            "must use the same vocabulary"
        )


def _tokenizer(run: Run, model: Checkpoint) -> Tokenizer:
    """Returns the configured tokenizer, else the one that lies with the model."""
    name = run.config.tokenizer
    tokenizer = load_tokenizer(models.resolve(name) if name else model.source)
    size = model.config.vocab_size
    if (tokenizer.pad_token_id or 0) >= size:
        raise UserError(
            f"the tokenizer pads with token {tokenizer.pad_token_id}, but the model has "
            f"{size} tokens; give a tokenizer whose pad token is one of them"
        )
    return tokenizer


def _for_generation(run: Run, model: Checkpoint) -> HybridLM:
    # Projections side by side are for one device: a mesh splits each of them.
    layout = "decode" if run.mesh.size == 1 else "train"
    compute = dataclasses.replace(
        run.config.compute, scan_layers=False, layout=layout, remat=False
    )
    return decoder.build(model.config, model.params, compute, run.mesh)


def _dataset(run: Run, data: RecordSource, tokenizer: Tokenizer) -> grain.MapDataset:
    stage = run.config.stage
    pad = tokenizer.pad_token_id
    common = {
        "batch_size": stage.batch_size,
        "length": stage.length,
        "seed": run.config.seed,
        "num_epochs": stage.epochs,
        "pad_id": pad if pad is not None else tokenizer.eos_token_id,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if stage.name == "dpo":
        return pipeline.pair_batches(
            data, max_prompt_length=stage.max_prompt_length, **common
        )
    return pipeline.batches(data, packed=stage.packed, **common)


def _conversations(run: Run, folder: Path, tokenizer: Tokenizer) -> RecordSource:
    spec = _wanted(
        run.config.data.conversations, "conversations", run.config.stage.name
    )
    chats = sources.conversations(spec)

    def encode(i: int) -> Example:
        return encode_chat(tokenizer, chats[i])

    encoded = map(encode, range(len(chats)))
    return _records(run, folder, spec, "example", encoded, len(chats))


def _records(
    run: Run,
    folder: Path,
    spec: str,
    kind: str,
    encoded: Iterable[Example | Pair],
    total: int,
) -> RecordSource:
    """Tokenises a stage's data once; a later start of the stage reads it from disk."""
    directory = folder / DATA
    if jax.process_index() == 0:
        fingerprint = json.dumps([spec, run.config.tokenizer or run.config.teacher])
        inputs = sources.digests(spec)
        with RecordWriter(
            directory, fingerprint=fingerprint, kind=kind, inputs=inputs
        ) as writer:
            if not writer.is_complete:
                skip = writer.num_written
                bar = progress(encoded, desc="tokenize", total=total, unit="record")
                for i, record in enumerate(bar):
                    if i >= skip:
                        writer.write(record)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"tokenize {directory}")
    return RecordSource(directory)


def _wanted(spec: str, key: str, stage: str) -> str:
    if not spec:
        raise UserError(f"stage {stage} needs data.{key} in the config")
    return spec
