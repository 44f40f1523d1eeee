r"""Answers a prompt in the terminal, or all prompts of a file.

python -m mil_jax.generate --model=demo_teacher --prompt="Spell the words pig and nut."

python -m mil_jax.generate --model=build/demo/export --draft=build/demo/draft/model \
    --input=prompts.jsonl --output=answers.jsonl

Lines of the file are {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]},
with an "id" if you like. Started again, the command goes on where it was stopped.
"""

import functools
import logging
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


def define_flags(values: flags.FlagValues) -> None:
    """Declares what the command line may say."""
    text, number, share, yes_no, choice, many = (
        functools.partial(define, flag_values=values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_bool,
            flags.DEFINE_enum,
            flags.DEFINE_multi_string,
        )
    )
    text("model", None, "Folder of a model or an export, hub id, or demo_teacher.")
    text("draft", None, "The same of a draft; default none.")
    per_step = "Tokens that the draft proposes per step, at most 19; auto: what pays."
    text("k", "4", per_step)
    text("prompt", None, "Text to answer in the terminal.")
    text("input", None, "JSON lines to answer.")
    text("output", None, "JSON lines with the answers.")
    yes_no("chat", None, "Use the chat template; default if the tokenizer has one.")
    text("system", None, "System message of chats without one.")
    number("max_new_tokens", 256, "Limit on an answer.")
    number("max_length", None, "Limit on prompt and answer; default the model's.")
    share("temperature", 0.0, "0 takes the likeliest token.")
    number("top_k", 0, "Draw from so many; 0: from all.")
    share("top_p", 1.0, "Draw from the likeliest that reach this mass.")
    number("seed", 0, "Of the draws.", lower_bound=0)
    number("batch_size", 32, "Lines answered together.", lower_bound=1)
    dtypes = ["auto", "float32", "bfloat16"]
    choice("dtype", "auto", dtypes, "auto: bfloat16 on a GPU, else float32.")
    many("stop", [], "End an answer before this text; may be given several times.")


def main(given: flags.FlagValues, argv: Sequence[str]) -> None:
    """Checks the flags and runs one of the two."""
    del argv
    _check(given)
    # What kernels run would be told in the middle of an answer.
    logging.getLogger("pallas_kernels").setLevel(logging.WARNING)
    # Imported here and below, so that --help and a wrong flag answer at once.
    import jax

    options = read_options(given)
    try:
        if given.prompt is not None:
            answer_prompt(options, given.prompt)
            return
        source, target = Path(given.input), Path(given.output)
        num_errors = answer_file(options, source, target, given.batch_size)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device's memory is full; lower --batch_size or --max_new_tokens"
        ) from error
    sys.exit(1 if num_errors else 0)


def _check(given: flags.FlagValues) -> None:
    if not given.model:
        raise UserError("flag --model is missing; see --help")
    if (given.prompt is None) == (given.input is None):
        raise UserError("give either --prompt or --input; see --help")
    if (given.input is None) != (given.output is None):
        raise UserError("--input and --output belong together; see --help")
    if given["k"].present and given.draft is None:
        raise UserError("--k needs --draft, which proposes the tokens")


def read_options(given: flags.FlagValues) -> "Options":
    """Returns what the flags say of the answers.

    Raises:
        UserError: A value is out of range.
    """
    from mil_jax.generate.plan import Options
    from mil_jax.generate.sampler import Sampling

    return Options(
        model=given.model,
        draft=given.draft,
        k=_number_or_auto(given.k),
        chat=given.chat,
        system=given.system,
        max_new_tokens=given.max_new_tokens,
        max_length=given.max_length,
        sampling=Sampling(given.temperature, given.top_k, given.top_p),
        seed=given.seed,
        dtype=given.dtype,
        stop=tuple(given.stop),
    )


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
    printed, remark = "", ""

    def show(text: str) -> None:
        nonlocal printed
        if text.startswith(printed):
            print(text[len(printed) :], end="", flush=True)
            printed = text

    try:
        (answer,) = running.answer([tokens], [0], block=STREAM_BLOCK, show=show)
        if answer.finish == "length":
            remark = f"; cut at the limit (max_new_tokens, {options.max_new_tokens})"
    finally:
        print(flush=True)
        logger.info(running.speed.line() + remark)


def answer_file(options: "Options", source: Path, target: Path, batch_size: int) -> int:
    """Answers the lines of a file into another; returns how many have no answer."""
    from mil_jax.generate import engine, files
    from mil_jax.generate.plan import make_plan

    plan = make_plan(options)
    done = files.answer_file(plan, engine.load, source, target, batch_size=batch_size)
    if not done.written:
        logger.info("%s was complete already", target)
    elif done.engine is not None:
        logger.info(done.engine.speed.line())
    if done.errors:
        text = "%d of %d lines of %s have an error instead of an answer"
        logger.warning(text, done.errors, done.lines, target)
    return done.errors


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run_app(functools.partial(main, flags.FLAGS))
