"""Shape checks shared by the operations; their errors name the argument."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def check_rank(op: str, name: str, value: Any, letters: str) -> None:
    """Raises ValueError unless `value` has one axis per word in `letters`."""
    if len(value.shape) != len(letters.split()):
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}, expected [{letters}]"
        )


def check_shape(
    op: str, name: str, value: Any, letters: str, expected: tuple[int, ...]
) -> None:
    """Raises ValueError unless `value` has the shape `expected`; None passes."""
    if value is not None and tuple(value.shape) != expected:
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}, "
            f"expected [{letters}] = {expected}"
        )


def check_shapes(
    op: str,
    arguments: Mapping[str, tuple[Any, str]],
    known: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, int]:
    """Returns the size of every letter, which is one wherever the letter stands.

    Args:
      op: Name of the operation, for messages.
      arguments: By name a value (None passes) and one letter per axis. A letter's size is
        that of the first argument that has it.
      known: Sizes of further letters.

    Raises:
      ValueError: A shape disagrees with its letters or with an argument before it.
    """
    sizes = dict(known)
    for name, (value, letters) in arguments.items():
        if value is None:
            continue
        shape, axes = tuple(value.shape), letters.split()
        if len(shape) == len(axes):
            for letter, size in zip(axes, shape, strict=True):
                sizes.setdefault(letter, size)
        expected = tuple(sizes.get(letter) for letter in axes)
        if shape != expected:
            numbers = "" if None in expected else f" = {expected}"
            raise ValueError(
                f"{op}: {name} has shape {shape}, expected [{letters}]{numbers}"
            )
    return sizes


def check_group(op: str, group: int, channels: int) -> None:
    """Raises ValueError unless groups of `group` channels cover the channels of x."""
    if group < 1 or channels % group:
        raise ValueError(
            f"{op}: group is {group}, which does not divide the {channels} channels of x"
        )


def check_groups(op: str, name: str, groups: int, channels: int) -> None:
    """Raises ValueError unless `groups` equal groups cover `channels` channels."""
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{op}: {name} has {groups} groups, which do not divide {channels} channels"
        )
