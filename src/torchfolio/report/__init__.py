"""Run folders as one self-contained HTML page."""

from torchfolio.report.page import write_report

__all__ = ["write_report"]
