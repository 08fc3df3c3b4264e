"""Build the optional C++ helpers; everything else is in pyproject.toml.

Nothing here imports torch, and nothing here can fail an installation: without a compiler or without pybind11
the package falls back to its Python twins.
"""

import sys

from setuptools import Extension, setup


def extensions() -> list[Extension]:
    """Both, or nothing where pybind11 is missing. ``optional``: a failed build is a warning."""
    try:
        import pybind11
    except ImportError:
        print("unimega: pybind11 is not installed, csrc/*.cpp is left out", file=sys.stderr)
        return []
    windows = sys.platform == "win32"
    flags = ["/std:c++17", "/O2"] if windows else ["-std=c++17", "-O3", "-fvisibility=hidden"]
    fused = [] if windows else ["-ffp-contract=fast"]
    threads = ["-fopenmp"] if sys.platform == "linux" else []
    common = {"include_dirs": [pybind11.get_include()], "language": "c++", "optional": True}
    return [
        Extension(
            "unimega._data_index",
            sources=["csrc/data_index.cpp", "csrc/routing.cpp"],
            extra_compile_args=flags,
            **common,
        ),
        Extension(
            "unimega._softmax",  # apart: a compiler without OpenMP loses this one alone
            sources=["csrc/softmax.cpp"],
            extra_compile_args=flags + fused + threads,
            extra_link_args=threads,
            **common,
        ),
    ]


setup(ext_modules=extensions())
