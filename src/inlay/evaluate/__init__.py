"""Evaluation: generation and option scoring in mixed batches, suites of tasks, paired statistics."""

from inlay.evaluate.decode import GenerateSettings, Generation, generate
from inlay.evaluate.options import option_scores

__all__ = ["GenerateSettings", "Generation", "generate", "option_scores"]
