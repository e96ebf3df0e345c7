"""report.html: one run as charts and tables, several runs side by side, or a sweep."""

from __future__ import annotations

from train.report.comparison import write_comparison
from train.report.page import write_report
from train.report.sweep_page import write_sweep_report

__all__ = ["write_comparison", "write_report", "write_sweep_report"]
