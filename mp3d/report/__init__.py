"""HTML pages that need nothing beside them: the evaluation reports, and the passport of prepared data."""

from mp3d.report.case_page import of_cases, write_case_report
from mp3d.report.files import ReportFiles
from mp3d.report.page import write_report
from mp3d.report.passport import PASSPORT_HTML, PASSPORT_JSON, Passport, write_passport

__all__ = [
    "PASSPORT_HTML",
    "PASSPORT_JSON",
    "Passport",
    "ReportFiles",
    "of_cases",
    "write_case_report",
    "write_passport",
    "write_report",
]
