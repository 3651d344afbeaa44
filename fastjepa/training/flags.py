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
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_HELP = ("-h", "--help")
_WORDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a word", Path: "a path"}


def check_flags(kind: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> None:
    """Look at the flags for the dataclass `kind`, and whether it can be made of them. With --help nothing is checked.

    Raises:
        ValueError: the first that is unknown, lacks its value or has one of the wrong kind; a word that belongs to no
            flag; one that is needed and not given; or what `kind` itself raises. The message says what is accepted.
    """
    if any(word in _HELP for word in argv):
        return
    assert dataclasses.is_dataclass(kind)
    hints = get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    given: dict[str, Any] = {}
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
            given[name.removeprefix("no_")] = not name.startswith("no_")
            continue
        if name not in fields:
            raise ValueError(f"there is no flag {flag}{_nearest(name, fields)}; {prog} --help lists all")
        if not has_value:
            if not words or _is_flag(words[0]):
                raise ValueError(f"{flag} needs a value: {_accepted(fields[name])}")
            value = words.pop(0)
        given[name] = _read(flag, fields[name], value)
    if default is not None:
        dataclasses.replace(default, **given)  # type: ignore[type-var]
        return
    for field in dataclasses.fields(kind):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in given:
            raise ValueError(f"--{field.name} is needed: {_accepted(fields[field.name])}; see {prog} --help")
    kind(**given)


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


def _read(flag: str, kind: Any, value: str) -> Any:
    for one in _kinds(kind):
        if one is type(None) and value == "None":
            return None
        if get_origin(one) is Literal and value in map(str, get_args(one)):
            return value
        if one is Path and not value:  # `--out "$unset"`; as a path it would be the working directory
            continue
        if one in _WORDS:
            try:
                return one(value)
            except ValueError:
                continue
    raise ValueError(f"{flag} must be {_accepted(kind)}; got {value!r}")


def _accepted(kind: Any) -> str:
    """In words, without the None of what is simply not given."""
    choices = [_words(one) for one in _kinds(kind) if one is not type(None)]
    return " or ".join(choices)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return _WORDS[kind]
