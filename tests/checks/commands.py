"""Command lines parsed without touching the process's own flags."""

from absl import flags


def parse(command, *args):
    """Returns the flags of a command's module, as `args` give them."""
    values = flags.FlagValues()
    command.define_flags(values)
    values([command.__name__, *map(str, args)])
    return values
