"""Flags that a command hands on to the trainer: they follow `--`, as in `COMMAND … -- --epochs 5 --precision bf16`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what the command itself is told, the trainer's flags): before and after the first `--`."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def refuse_flags(flags: Sequence[str], reasons: Mapping[str, str]) -> None:
    """Refuse what the command sets for the trainer itself: without this, one of the two would win unseen.

    Raises:
        ValueError: one of `flags` is a key of `reasons`, alone or as `--flag=value`; the message is the flag and its
            reason.
    """
    for word in flags:
        name = word.partition("=")[0]
        if name in reasons:
            raise ValueError(f"{name} {reasons[name]}")
