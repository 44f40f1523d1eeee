"""One way to read a model, whatever format it is stored in."""

from pathlib import Path

from mil_jax.checkpoint import hf_import, orbax_io
from mil_jax.checkpoint.hf_import import Checkpoint
from mil_jax.checkpoint.tensor_files import has_weights
from mil_jax.config import ModelConfig
from mil_jax.errors import UserError

# The name of the small teacher that ships with the package.
DEMO_TEACHER = "demo_teacher"


def resolve(path_or_id: str | Path) -> str | Path:
    """Returns the folder behind the name `demo_teacher`, any other name as it is."""
    if str(path_or_id) == DEMO_TEACHER:
        return Path(__file__).parents[1] / "assets" / DEMO_TEACHER
    return path_or_id


def load(path_or_id: str | Path) -> Checkpoint:
    """Returns a model saved by a stage, a Hugging Face folder or hub repository.

    The name `demo_teacher` stands for the teacher that ships with the package.

    Raises:
        UserError: It cannot be found or read; see `hf_import.load`.
    """
    name = resolve(path_or_id)
    path = Path(name).expanduser()
    if path.is_dir() and orbax_io.is_model_dir(path):
        config, params = orbax_io.load_model(path)
        return Checkpoint(config, params, path)
    _check_is_model(path)
    return hf_import.load(name)


def read_config(path_or_id: str | Path) -> tuple[ModelConfig, Path]:
    """Returns a model's architecture and its folder; weights are not read.

    Raises:
        UserError: As `load`.
    """
    name = resolve(path_or_id)
    path = Path(name).expanduser()
    if path.is_dir() and orbax_io.is_model_dir(path):
        return orbax_io.read_config(path), path
    _check_is_model(path)
    folder = hf_import.local_folder(name)
    return hf_import.read_config(folder), folder


def _check_is_model(path: Path) -> None:
    """Helps out whoever names the folder above or below a model."""
    if not path.is_dir() or (path / "config.json").is_file() and has_weights(path):
        return
    for near in (path / "model", path / "distill" / "model", path.parent):
        if orbax_io.is_model_dir(near):
            raise UserError(f"{path} is not a model; did you mean {near}?")
