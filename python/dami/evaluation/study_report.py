"""The old name of `dami.evaluation.study.report`."""

from dami.evaluation.study.report import write_study_report as write_report

__all__ = ["write_report"]
