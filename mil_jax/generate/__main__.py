r"""Answers a prompt in the terminal, or all prompts of a file.

python -m mil_jax.generate --model=demo_teacher --prompt="Spell the words pig and nut."

python -m mil_jax.generate --model=build/demo/export --draft=build/demo/draft/model \
    --input=prompts.jsonl --output=answers.jsonl

Lines of the file are {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]},
with an "id" if you like. Started again, the command goes on where it was stopped.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from mil_jax import cli
from mil_jax.errors import UserError

if TYPE_CHECKING:
    from mil_jax.generate.plan import Options

# `__name__` is not the package's when this runs as a command.
logger = logging.getLogger("mil_jax.generate")

# Tokens (steps, with a draft) between two looks at an answer that is being printed.
STREAM_BLOCK = 16

_MODEL = flags.DEFINE_string(
    "model", None, "Folder of a model or an export, hub id, or demo_teacher."
)
_DRAFT = flags.DEFINE_string("draft", None, "The same of a draft; default none.")
_K = flags.DEFINE_string(
    "k", "4", "Tokens that the draft proposes per step; auto: what pays best."
)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to answer in the terminal.")
_INPUT = flags.DEFINE_string("input", None, "JSON lines to answer.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON lines with the answers.")
_CHAT = flags.DEFINE_bool(
    "chat", None, "Use the chat template; default if the tokenizer has one."
)
_SYSTEM = flags.DEFINE_string("system", None, "System message of chats without one.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Limit on an answer.")
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Limit on prompt and answer; default the model's."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many; 0: from all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw from the likeliest that reach this mass."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Lines answered together.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16"],
    "auto: bfloat16 on a GPU, else float32.",
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "End an answer before this text; may be given several times."
)


def main(argv: Sequence[str]) -> None:
    """Checks the flags and runs one of the two."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags start with --")
    if not _MODEL.value:
        raise UserError("flag --model is missing; see --help")
    if (_PROMPT.value is None) == (_INPUT.value is None):
        raise UserError("give either --prompt or --input; see --help")
    if (_INPUT.value is None) != (_OUTPUT.value is None):
        raise UserError("--input and --output belong together; see --help")
    if _K.present and _DRAFT.value is None:
        raise UserError("--k needs --draft, which proposes the tokens")
    # What kernels run would be told in the middle of an answer.
    logging.getLogger("pallas_kernels").setLevel(logging.WARNING)
    # Imported here and below, so that --help and a wrong flag answer at once.
    import jax

    from mil_jax.generate.plan import Options
    from mil_jax.generate.sampler import Sampling

    options = Options(
        model=_MODEL.value,
        draft=_DRAFT.value,
        k=_number_or_auto(_K.value),
        chat=_CHAT.value,
        system=_SYSTEM.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        max_length=_MAX_LENGTH.value,
        sampling=Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value),
        seed=_SEED.value,
        dtype=_DTYPE.value,
        stop=tuple(_STOP.value),
    )
    try:
        if _PROMPT.value is not None:
            answer_prompt(options, _PROMPT.value)
            return
        source, target = Path(_INPUT.value), Path(_OUTPUT.value)
        num_errors = answer_file(options, source, target, _BATCH_SIZE.value)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device's memory is full; lower --batch_size or --max_new_tokens"
        ) from error
    except BrokenPipeError:  # Whoever read the answer has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    sys.exit(1 if num_errors else 0)


def _number_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--k is {text!r}; give a number or auto") from None


def answer_prompt(options: "Options", prompt: str) -> None:
    """Prints the answer to one prompt as it is decoded, then its speed on stderr."""
    from mil_jax.generate import engine
    from mil_jax.generate.plan import make_plan

    plan = make_plan(options)
    tokens = plan.encode(prompt)
    running = engine.load(plan)
    printed = ""

    def show(text: str) -> None:
        nonlocal printed
        if text.startswith(printed):
            print(text[len(printed) :], end="", flush=True)
            printed = text

    try:
        running.answer([tokens], [0], block=STREAM_BLOCK, show=show)
    finally:
        print(flush=True)
        logger.info(running.speed.line())


def answer_file(options: "Options", source: Path, target: Path, batch_size: int) -> int:
    """Answers the lines of a file into another; returns how many have no answer."""
    from mil_jax.generate import engine, files
    from mil_jax.generate.plan import make_plan

    plan = make_plan(options)
    done = files.answer_file(plan, engine.load, source, target, batch_size=batch_size)
    if done.engine is None:
        logger.info("%s was complete already", target)
    else:
        logger.info(done.engine.speed.line())
    if done.errors:
        text = "%d of %d lines of %s have an error instead of an answer"
        logger.warning(text, done.errors, done.lines, target)
    return done.errors


if __name__ == "__main__":
    cli.run_app(main)
