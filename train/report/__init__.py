"""report.html: what a person sees of a run, and of several runs side by side."""

from __future__ import annotations

from train.report.comparison import write_comparison
from train.report.page import write_report

__all__ = ["write_comparison", "write_report"]
