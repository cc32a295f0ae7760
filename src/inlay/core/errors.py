"""The one error that Inlay raises for a user's mistake, and the end of a run that was asked to stop."""


class InlayError(ValueError):
    """A request that cannot be carried out; the message says what is wrong, what exists and what to do."""


class Terminated(BaseException):
    """Work ends because the process was asked to, by SIGTERM."""


def unknown(what: str, value: object, known: object, hint: str = "") -> InlayError:
    """The error for a name that does not exist; lists those that do."""
    names = ", ".join(sorted(map(str, known)))  # type: ignore[call-overload]
    return InlayError(f"unknown {what} {value!r}; there is: {names or 'nothing'}.{' ' + hint if hint else ''}")
