"""The distributed engine: the only package that imports megatron-core, after making it fit this device."""

from unimega.backend import redirection
from unimega.parallel import repairs

redirection.install()
repairs.install()
