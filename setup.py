"""Build the optional C++ helper; everything else is in pyproject.toml.

Nothing here imports torch, and nothing here can fail an installation: without a compiler or without pybind11
the package falls back to its Python twins.
"""

import sys

from setuptools import Extension, setup


def extensions() -> list[Extension]:
    """``unimega._data_index``, or nothing where pybind11 is missing. ``optional``: a failed build is a warning."""
    try:
        import pybind11
    except ImportError:
        print("unimega: pybind11 is not installed, csrc/*.cpp is left out", file=sys.stderr)
        return []
    flags = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden"]
    if sys.platform == "win32":
        flags = ["/std:c++17", "/O2"]
    threads = ["-fopenmp"] if sys.platform == "linux" else []
    return [
        Extension(
            "unimega._data_index",
            sources=["csrc/data_index.cpp", "csrc/routing.cpp", "csrc/softmax.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=flags + threads,
            extra_link_args=threads,
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions())
