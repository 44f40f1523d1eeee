"""Shape checks shared by the operations; their errors name the argument."""

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


def check_groups(op: str, name: str, groups: int, channels: int) -> None:
    """Raises ValueError unless `groups` equal groups cover `channels` channels."""
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{op}: {name} has {groups} groups, which do not divide {channels} channels"
        )
