"""Libraries of adapters: composed with one another, kept on disk and in memory."""

from inlay.library.bank import Bank, Lease
from inlay.library.compose import compose
from inlay.library.errors import BankError

__all__ = ["Bank", "BankError", "Lease", "compose"]
