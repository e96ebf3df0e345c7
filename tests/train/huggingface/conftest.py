"""The fixtures of exports and imports."""

from __future__ import annotations

from tests.support.fixtures import checkpoint, corpus, overrides, refused

__all__ = ["checkpoint", "corpus", "overrides", "refused"]
