"""The fixtures of the tests of commands: a small corpus, a short run, a trained checkpoint, and commands refused."""

from __future__ import annotations

from tests.support.fixtures import checkpoint, corpus, heeds_ctrl_c, overrides, refused

__all__ = ["checkpoint", "corpus", "heeds_ctrl_c", "overrides", "refused"]
