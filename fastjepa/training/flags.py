"""Flags looked at before they are parsed, so that a mistake is answered in one line that names what is accepted.

tyro, which parses them, draws boxes of many lines. What this accepts is what it accepts, for the kinds of fields that
the options here have: numbers, words, paths, choices, switches, each perhaps None.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_HELP = ("-h", "--help")
_WORDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a word", Path: "a path"}


def check_flags(kind: type, argv: Sequence[str], prog: str) -> None:
    """Look at the flags for the dataclass `kind`. With --help among them nothing is checked.

    Raises:
        ValueError: the first that is unknown, lacks its value or has one of the wrong kind; or a word that belongs to
            no flag. The message says what is accepted.
    """
    if any(word in _HELP for word in argv):
        return
    hints = get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--"):
            raise ValueError(f"{word!r} belongs to no flag; flags begin with --, and {prog} --help lists them")
        if _is_switch(fields.get(name.removeprefix("no_"))):
            if has_value:
                raise ValueError(f"{flag} takes no value, got {value!r}; it is given or not")
            continue
        if name not in fields:
            raise ValueError(f"there is no flag {flag}{_nearest(name, fields)}; {prog} --help lists all")
        if not has_value:
            if not words or _is_flag(words[0]):
                raise ValueError(f"{flag} needs a value: {_accepted(fields[name])}")
            value = words.pop(0)
        if not any(_fits(one, value) for one in _kinds(fields[name])):
            raise ValueError(f"{flag} must be {_accepted(fields[name])}; got {value!r}")


def _is_flag(word: str) -> bool:
    """Not so is a negative number."""
    return word.startswith("--") or word in _HELP


def _nearest(name: str, fields: dict[str, Any]) -> str:
    near = difflib.get_close_matches(
        name, [*fields, *(f"no_{n}" for n, kind in fields.items() if _is_switch(kind))], n=1
    )
    return f"; perhaps --{near[0]} is meant" if near else ""


def _is_switch(kind: Any) -> bool:
    return kind is bool


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The kinds of which a value may be: those of a union, or the one."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _fits(kind: Any, value: str) -> bool:
    if kind is type(None):
        return value == "None"
    if get_origin(kind) is Literal:
        return value in map(str, get_args(kind))
    if kind in (int, float):
        try:
            kind(value)
        except ValueError:
            return False
    return True  # also for what is not known here: tyro will say


def _accepted(kind: Any) -> str:
    """In words, without the None of what is simply not given."""
    choices = [_words(one) for one in _kinds(kind) if one is not type(None)]
    return " or ".join(choices)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
