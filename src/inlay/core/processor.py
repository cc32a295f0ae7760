"""Which CPU library multiplies float32 matrices on this machine: every choice that depends on the processor is here.

PyTorch multiplies float32 matrices on x86 CPUs with Intel's MKL, which keeps to AVX2 on processors of other makers. Its
builds have oneDNN too, which uses what the processor offers. The choice rests on the maker's name, not on a
measurement, so that two runs on one machine compute the same bits. `INLAY_CPU_PRODUCTS` overrides it.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch

from inlay.compat.torch import has_onednn_linear, onednn_has_bfloat16
from inlay.core.errors import InlayError

VARIABLE = "INLAY_CPU_PRODUCTS"
"""Environment variable, read once: `auto` (default), `mkl` (PyTorch's own choice) or `onednn`."""
LIBRARIES = ("mkl", "onednn")
NUMERIC_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)
"""Environment variables of PyTorch, oneDNN and MKL that choose between kernels, and so between last bits."""


_ONEDNN = has_onednn_linear()
"""Tried once, here: a compiler would trace the trial."""


@functools.cache
def has_onednn() -> bool:
    """Whether PyTorch's bundled oneDNN can be called for a single product."""
    return torch.backends.mkldnn.is_available() and _ONEDNN


@functools.cache
def has_onednn_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this processor."""
    return has_onednn() and onednn_has_bfloat16()


@functools.cache
def product_library() -> str:
    """The library for float32 products of matrices on CPUs: `mkl` or `onednn`.

    Raises:
        InlayError: if `INLAY_CPU_PRODUCTS` names anything else, or a library that this PyTorch lacks.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in ("auto", *LIBRARIES):
        raise InlayError(f"{VARIABLE}={asked} is not one of auto, {', '.join(LIBRARIES)}.")
    if asked == "onednn" and not has_onednn():
        raise InlayError(f"{VARIABLE}=onednn, but this PyTorch ({torch.__version__}) has no oneDNN; use auto.")
    if asked != "auto":
        return asked
    both = has_onednn() and torch.backends.mkl.is_available()
    return "onednn" if both and _made_by_amd() else "mkl"


def prefers_onednn() -> bool:
    """Whether float32 products go through oneDNN on this machine."""
    return product_library() == "onednn"


def allows_onednn() -> bool:
    """Whether oneDNN may compute single products where it is faster, whatever the library for the others."""
    if os.environ.get(VARIABLE) in LIBRARIES:
        return prefers_onednn()
    return has_onednn() and torch.backends.mkl.is_available()


def describe() -> dict[str, object]:
    """What decides the last bits of a product: processor, instructions, library, and variables that choose kernels."""
    return {
        "processor": processor_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cpu_products": product_library(),
        "float32_precision": torch.get_float32_matmul_precision(),
        "numeric_variables": {name: os.environ[name] for name in NUMERIC_VARIABLES if name in os.environ},
    }


@functools.cache
def processor_name() -> str:
    """The processor's model name, as the system gives it."""
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _made_by_amd() -> bool:
    return _cpu_info().get("vendor_id", platform.processor()).find("AuthenticAMD") >= 0


@functools.cache
def _cpu_info() -> dict[str, str]:
    """The first processor's entry in Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


product_library()  # a wrong value is refused here, and not in the middle of a run
