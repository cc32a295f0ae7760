"""How far two orders of one computation may be apart, from the sizes of the model and the type of its numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_equal_to_rounding(got: Tensor, want: Tensor, model: nn.Module, msg: str = "") -> None:
    """|got - want| <= 2 u n sqrt(w) max|want|, for outputs of a decoder of n linears in a row, the widest of w inputs.

    A dot product of w terms is wrong by about sqrt(w) u relative to the norms of its factors (Higham and Mary 2019, "A
    new approach to probabilistic rounding error analysis", theorem 3.1, with lambda = 1), whatever its order; errors of
    n of them add up, and there are two computations. Which kernels ran does not enter, so the bound holds on any
    processor.
    """
    widths = [m.weight.shape[1] for m in model.modules() if isinstance(m, nn.Linear)]
    widths += [m.weight.shape[0] for m in model.modules() if type(m).__name__ == "Conv1D"]
    bound = torch.finfo(want.dtype).eps * len(widths) * max(widths) ** 0.5 * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=bound, msg=(lambda found: f"{msg}: {found}") if msg else None)
