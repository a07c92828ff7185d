"""The evaluation report: one HTML file that needs nothing beside it."""

from mp3d.report.page import write_report

__all__ = ["write_report"]
