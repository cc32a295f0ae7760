"""What goes wrong with a request, and the HTTP status that says so."""

from __future__ import annotations

from inlay.core.errors import InlayError
from inlay.library.errors import BankError, Kind

OF_A_BANK: dict[Kind, tuple[int, str]] = {
    "unknown": (404, "model_not_found"),
    "broken": (500, "adapter_broken"),  # not 503: a load balancer would ask, or put down, one replica after the other
    "unfit": (422, "adapter_broken"),
    "exists": (409, "model_exists"),
    "bad-name": (400, "bad_name"),
    "bad-source": (400, "bad_source"),
    "invalid": (400, "invalid_model"),
}
"""What a bank refuses -> HTTP status, word for programs."""

HINTS: dict[tuple[Kind, str], str] = {
    ("unknown", "model"): "; /v1/models lists those that do",
    ("unknown", "name"): "; GET /admin/adapters lists those there are",
    ("broken", "model"): ". It is not tried again until PUT /admin/adapters/NAME loads it anew",
}


class Refused(InlayError):
    """A request that is not served, as OpenAI's clients read it.

    Args:
        status: of HTTP.
        code: a word for programs.
        param: the field of the request that is at fault.
        again: whether the same request may succeed later; otherwise clients are told not to retry.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @classmethod
    def by_bank(cls, e: BankError) -> Refused:
        """As HTTP says it."""
        return cls(f"{e}{HINTS.get((e.kind, e.field), '')}", *OF_A_BANK[e.kind], e.field)

    @property
    def again(self) -> bool:
        """Whether trying again makes sense."""
        return self.status in (429, 503)

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        by_status = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
        by_status[429] = "rate_limit_error"
        return by_status.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, object]:
        """OpenAI's JSON."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}
