"""The seam for Ascend NPUs (torch-npu, hccl): a class with CpuBackend's and CudaBackend's methods goes here.

With it comes a second table in ``redirection``: the same names, with ``torch.npu`` for what stands in on CPU.
"""

from unimega.backend.base import Backend
from unimega.errors import BackendError


def npu_backend() -> Backend:
    """The Ascend backend.

    Raises:
        BackendError: always, as long as nobody has written and run it.
    """
    raise BackendError(
        "backend='npu' is not there yet: it has never run on hardware and comes with the Ascend kernels. "
        "Call unimega.backend.use('cpu') before anything else to run on this machine's CPU."
    )
