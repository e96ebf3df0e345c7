"""report.html: one run as charts and tables, or several runs side by side."""

from __future__ import annotations

from train.report.comparison import write_comparison
from train.report.page import write_report

__all__ = ["write_comparison", "write_report"]
