"""The old name of `dami.evaluation.training`."""

from dami.evaluation.training import train_estimator

__all__ = ["train_estimator"]
