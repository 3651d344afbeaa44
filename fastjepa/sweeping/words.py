"""The trainer's flags as words, before anything has parsed them."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def given(name: str, flags: Sequence[str]) -> str | None:
    """The value that `flags` have for the option, the last if there are several; None if they do not name it."""
    found = None
    for word, after in zip(flags, [*flags[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if _option(flag) == name:
            found = value if equals else after
    return found


def without(names: Collection[str], flags: Sequence[str]) -> list[str]:
    """`flags` without those of these options, which all take one value."""
    kept: list[str] = []
    words = list(flags)
    while words:
        word = words.pop(0)
        flag, equals, _ = word.partition("=")
        if _option(flag) not in names:
            kept.append(word)
        elif not equals and words:
            words.pop(0)
    return kept


def with_preset(flags: Sequence[str], preset: str) -> list[str]:
    """`flags` with the preset that they stand for on this machine: auto may be another one elsewhere."""
    return [*without(("preset",), flags), "--preset", preset]


def _option(word: str) -> str:
    """ "--batch-size" is the flag of batch_size; "" for what is no flag."""
    return word[2:].replace("-", "_") if word.startswith("--") else ""
