"""Counting before training: parameters, file size and memory of an adapter, from a model's config alone."""

from inlay.plan.count import Plan, plan
from inlay.plan.memory import Memory

__all__ = ["Memory", "Plan", "plan"]
