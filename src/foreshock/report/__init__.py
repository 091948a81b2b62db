"""What the files of a run say, as one page that can be opened anywhere."""

from foreshock.report.data import report_data
from foreshock.report.page import render, write_report

__all__ = ["render", "report_data", "write_report"]
