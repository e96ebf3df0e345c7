"""The fixtures of the tests of evidence: a small corpus and the overrides of a short run."""

from __future__ import annotations

from tests.support.fixtures import corpus, overrides

__all__ = ["corpus", "overrides"]
