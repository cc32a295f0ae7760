"""Evaluation: generation and option scoring in mixed batches, suites of tasks, paired statistics."""

from inlay.evaluate.decode import generate
from inlay.evaluate.options import option_scores
from inlay.evaluate.report import Cell, Report
from inlay.evaluate.rows import GenerateSettings, Generation
from inlay.evaluate.settings import EvalSettings, run
from inlay.evaluate.stats import Paired, paired
from inlay.evaluate.suite import evaluate

__all__ = [
    "Cell",
    "EvalSettings",
    "GenerateSettings",
    "Generation",
    "Paired",
    "Report",
    "evaluate",
    "generate",
    "option_scores",
    "paired",
    "run",
]
