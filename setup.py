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
    flags = ["/std:c++17", "/O2"] if sys.platform == "win32" else ["-std=c++17", "-O3", "-fvisibility=hidden"]
    fused = [] if sys.platform == "win32" else ["-ffp-contract=fast"]
    threads = ["-fopenmp"] if sys.platform == "linux" else []

    def extension(name: str, *sources: str, compile_args: list[str], link_args: list[str]) -> Extension:
        return Extension(
            name,
            sources=list(sources),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=flags + compile_args,
            extra_link_args=link_args,
            language="c++",
            optional=True,
        )

    return [
        extension("unimega._data_index", "csrc/data_index.cpp", "csrc/routing.cpp", compile_args=[], link_args=[]),
        extension("unimega._softmax", "csrc/softmax.cpp", compile_args=fused + threads, link_args=threads),
    ]


setup(ext_modules=extensions())
