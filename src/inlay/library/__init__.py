"""Libraries of adapters: composed with one another, kept on disk and in memory."""

from inlay.library.compose import compose

__all__ = ["compose"]
