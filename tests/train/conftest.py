"""The fixtures of the tests of training: a small corpus, and the overrides of a run of seconds."""

from __future__ import annotations

from tests.support.fixtures import corpus, overrides

__all__ = ["corpus", "overrides"]
