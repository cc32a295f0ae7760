"""Products: either library gives what float64 gives, to a bound on rounding, for every shape, layout and type."""

from __future__ import annotations

import itertools
import runpy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inlay.core import processor
from inlay.core import product as products
from inlay.core.errors import InlayError
from inlay.engine.fused import Linears
from inlay.engine.linear import plain
from inlay.engine.loss import linear_cross_entropies
from inlay.engine.reorder import Reordered

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "every second column", "every second row", "rows of a wider one")
LAYOUTS += ("one row expanded", "one column expanded", "one number expanded", "overlapping", "misaligned")
SIZES = st.sampled_from((0, 1, 2, 3, 5, 8, 17, 33, 64))


def matrix(layout: str, rows: int, columns: int, dtype=torch.float32) -> Tensor:
    def random(*shape):
        return torch.randn(*shape).to(dtype)

    match layout:
        case "contiguous":
            return random(rows, columns)
        case "transposed":
            return random(columns, rows).t()
        case "every second column":
            return random(rows, 2 * columns)[:, ::2]
        case "every second row":
            return random(2 * rows, columns)[::2]
        case "rows of a wider one":
            return random(rows, columns + 3)[:, 1 : columns + 1]
        case "one row expanded":
            return random(1, columns).expand(rows, columns)
        case "one column expanded":
            return random(rows, 1).expand(rows, columns)
        case "one number expanded":
            return random(1, 1).expand(rows, columns)
        case "overlapping":
            return random(rows + columns).as_strided((rows, columns), (1, 1))
        case "misaligned":
            return random(1 + rows * columns)[1:].view(rows, columns)
    raise ValueError(layout)


def vector(layout: str, size: int, dtype=torch.float32) -> Tensor:
    return matrix(layout, 2, size, dtype)[1]


def close(got: Tensor, x: Tensor, W: Tensor, b: Tensor | None = None, onto: Tensor | None = None, s: float = 1.0):
    """got = onto + s x W^T + b within what any order of summation may lose: K u / (1 - K u) times the same of absolute
    values (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5), K terms summed in float32 or
    wider, and one rounding to the type of the result at each of the at most four operations."""
    terms, weights = x.double(), W.double()
    want, size = s * terms @ weights.T, abs(s) * terms.abs() @ weights.abs().T
    for more in (b, onto):
        if more is not None:
            want, size = want + more.double(), size + more.double().abs()
    K, u = x.shape[-1] + 4, torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps / 2
    bound = size * (K * u / (1 - K * u) + 4 * torch.finfo(got.dtype).eps) + torch.finfo(got.dtype).tiny
    assert got.shape == want.shape
    assert not got.numel() or ((got.double() - want).abs() <= bound).all()


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    shape=st.tuples(SIZES, SIZES, SIZES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    library=st.sampled_from(processor.LIBRARIES),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape_layout_and_type(shape, layouts, dtype, bias, library, seed):
    if library == "onednn" and not processor.has_onednn():
        return
    torch.manual_seed(seed)
    N, K, M = shape
    x, W = matrix(layouts[0], N, K, dtype), matrix(layouts[1], M, K, dtype)
    b = vector(layouts[2], M, dtype) if bias and layouts[2] != "overlapping" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "product_library", lambda: library)
        close(products.product(x, W, b), x, W, b)
        onto = matrix("contiguous" if "expanded" in layouts[3] or "over" in layouts[3] else layouts[3], N, M, dtype)
        before = onto.clone()
        got = products.add_product(onto, x, W, 0.5)
        assert got.data_ptr() == onto.data_ptr()
        close(got, x, W, onto=before, s=0.5)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0), (2, 3), (0, 3), (2, 1, 3)], ids=str)
def test_products_keep_leading_dimensions(library, shape):
    x, W, b = torch.randn(*shape, 6), torch.randn(5, 6), torch.randn(5)
    torch.testing.assert_close(products.product(x, W, b), x @ W.T + b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", itertools.product((0, 1, 4), (1, 7), (0, 1, 3), (1, 5)), ids=str)
def test_low_rank_and_its_gradients_for_small_sizes(library, sizes):
    """Zero and one rows, features and ranks: what autograd makes of the formula in float64."""
    N, D_in, R, D_out = sizes
    torch.manual_seed(0)
    inputs = [torch.randn(*s) for s in ((N, D_in), (R, D_in), (D_out, R), (N, D_out))]
    g = torch.randn(N, D_out)
    for used in (4, 3):
        leaves = [t.clone().requires_grad_() for t in inputs[:used]]
        exact = [t.double().requires_grad_() for t in inputs[:used]]
        x, A, B, *y = leaves
        got = products.low_rank(x, A, B, 0.5, onto=y[0] if y else None)
        with torch.no_grad():
            quiet = products.low_rank(x, A, B, 0.5, onto=y[0] if y else None)
        want = 0.5 * exact[0] @ exact[1].T @ exact[2].T + (exact[3] if y else 0)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(quiet.double(), want, rtol=1e-5, atol=1e-5)
        grads, right = torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, exact, g.double())
        for a, b in zip(grads, right, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_layers_with_their_edits_for_no_row_and_one(library, rows, dtype):
    """The engine's node: q and v of LoRA, one of them with a gain, forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(rows, 6).to(dtype).requires_grad_()
    W = [torch.randn(n, 6).to(dtype) for n in (5, 4)]
    A, B = ([torch.randn(*s).to(dtype).requires_grad_() for s in shapes] for shapes in ([(2, 6)] * 2, [(5, 2), (4, 2)]))
    gain = torch.rand(4).to(dtype).requires_grad_()
    flat = (A[0], B[0], None, None, None, A[1], B[1], gain, None, None)
    ys = Linears.apply(x, [(W[0], None), (W[1], None)], [0.5, 0.5], [None, None], *flat)
    leaves = [x, *A, *B, gain]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    ex, eA, eB, eg = exact[0], exact[1:3], exact[3:5], exact[5]
    want = [ex @ (w.double() + 0.5 * b @ a).T for w, a, b in zip(W, eA, eB, strict=True)]
    want[1] = eg * want[1]
    eps = torch.finfo(dtype).eps
    near = dict(rtol=64 * eps, atol=64 * eps)  # products of 6 and 2 terms near 1, rounded five times on the way
    for y, right in zip(ys, want, strict=True):
        torch.testing.assert_close(y.double(), right, **near)
    grads = torch.autograd.grad(sum(y.sum() for y in ys), leaves)
    rights = torch.autograd.grad(sum(y.sum() for y in want), exact)
    for a, b in zip(grads, rights, strict=True):
        torch.testing.assert_close(a.double(), b, **near)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 0, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_layers_of_any_leading_shape(library, shape, bias, monkeypatch):
    monkeypatch.setattr("inlay.engine.reorder.FEW", 1)
    m = nn.Linear(6, 5, bias=bias).requires_grad_(False)
    x = torch.randn(*shape, requires_grad=True)
    want = m(x)
    torch.testing.assert_close(plain(m, x), want, rtol=1e-5, atol=1e-6)
    g = torch.randn_like(want)
    (got,), (right,) = torch.autograd.grad(plain(m, x), x, g), torch.autograd.grad(want, x, g)
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), Reordered(m).active():
        torch.testing.assert_close(m(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_cross_entropy_of_no_position_and_one(library, rows):
    h, W, target = torch.randn(rows, 6, requires_grad=True), torch.randn(9, 6), torch.randint(9, (rows,))
    got, want = (
        linear_cross_entropies(h, W, None, target),
        nn.functional.cross_entropy(h @ W.T, target, reduction="none"),
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    (a,), (b,) = torch.autograd.grad(got.sum(), h), torch.autograd.grad(want.sum(), h)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_leaves_an_adapter_in_float32(library):
    torch.manual_seed(0)
    x, A, B, y = (torch.randn(*s, requires_grad=True) for s in ((2, 5, 12), (4, 12), (16, 4), (2, 5, 16)))
    want = products.low_rank(x, A, B, 0.5, onto=y)
    with torch.autocast("cpu", torch.bfloat16):
        got = products.low_rank(x, A, B, 0.5, onto=y)
        grads = torch.autograd.grad(got.sum(), (x, A, B, y))
    assert torch.equal(got, want)
    for a, b in zip(grads, torch.autograd.grad(want.sum(), (x, A, B, y)), strict=True):
        assert torch.equal(a, b)


def test_autocast_means_the_same_to_a_frozen_layer_in_either_library(library):
    m, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(m, x).dtype == m(x).dtype == torch.bfloat16
        assert products.product(x, m.weight).dtype == torch.bfloat16


def test_no_product_of_one_output_is_held_whole(library):
    """Beside the result, at most `ROWS` rows of it."""
    N, K, M = 4 * products.ROWS, 64, 256
    x, W, onto = torch.randn(N, K), torch.randn(M, K), torch.randn(N, M)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        products.add_product(onto, x, W)
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(sizes, default=0) <= 4 * products.ROWS * M


def test_a_copy_is_made_only_of_what_stands_askew():
    t = torch.randn(32)
    assert products.aligned(t) is t
    moved = products.aligned(t[1:])
    assert torch.equal(moved, t[1:]) and moved.data_ptr() % products.ALIGNMENT == 0


def test_the_environment_chooses_the_library(monkeypatch):
    monkeypatch.setattr(processor, "product_library", processor.product_library.__wrapped__)  # as if never asked before
    for asked in ("mkl", "onednn") if processor.has_onednn() else ("mkl",):
        monkeypatch.setenv(processor.VARIABLE, asked)
        assert processor.product_library() == asked and processor.allows_onednn() == (asked == "onednn")
    automatic = set()
    for asked in ("auto", ""):
        monkeypatch.setenv(processor.VARIABLE, asked)
        automatic.add(processor.product_library())
    assert len(automatic) == 1


def test_a_wrong_choice_is_refused_at_import(monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, "amx")
    with pytest.raises(InlayError, match="INLAY_CPU_PRODUCTS=amx is not one of auto, mkl, onednn"):
        runpy.run_path(processor.__file__)
    monkeypatch.setenv(processor.VARIABLE, "onednn")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(InlayError, match="has no oneDNN; use auto"):
        runpy.run_path(processor.__file__)


def test_the_automatic_choice_rests_on_the_maker(monkeypatch):
    choose = processor.product_library.__wrapped__
    monkeypatch.delenv(processor.VARIABLE, raising=False)
    monkeypatch.setattr(processor, "has_onednn", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for maker, library in (("AuthenticAMD", "onednn"), ("GenuineIntel", "mkl"), ("", "mkl")):
        monkeypatch.setattr(processor, "_cpu_info", lambda maker=maker: {"vendor_id": maker})
        assert choose() == library
    monkeypatch.setattr(processor, "_cpu_info", lambda: {"vendor_id": "AuthenticAMD"})
    monkeypatch.setattr(processor, "has_onednn", lambda: False)
    assert choose() == "mkl"


def test_what_decides_the_last_bits_is_described(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = processor.describe()
    assert found["cpu_products"] in processor.LIBRARIES and found["processor"] and found["instruction_set"]
    assert found["numeric_variables"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
