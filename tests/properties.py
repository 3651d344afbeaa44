"""hypothesis; where it is not installed, stand-ins that skip the tests that are made of it, and leave the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:

    class _Nothing:
        """Whatever is called on it or asked of it is itself."""

        def __call__(self, *_: Any, **__: Any) -> _Nothing:
            return self

        def __getattr__(self, _: str) -> _Nothing:
            return self

    st = _Nothing()

    def settings(**_: Any) -> Callable[[Any], Any]:
        return lambda test: test

    def given(**_: Any) -> Callable[[Any], Any]:
        def skipped(test: Callable[..., None]) -> Callable[[], None]:
            def test_without_arguments() -> None:
                pytest.skip("needs the Python package hypothesis, which is not installed")

            test_without_arguments.__name__ = test.__name__
            return test_without_arguments

        return skipped


__all__ = ["given", "settings", "st"]
