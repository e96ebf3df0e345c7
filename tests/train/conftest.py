"""The fixtures of the tests of training: a small corpus, the overrides of a short run, commands refused."""

from __future__ import annotations

from tests.support.fixtures import corpus, heeds_ctrl_c, overrides, refused

__all__ = ["corpus", "heeds_ctrl_c", "overrides", "refused"]
