"""Rows of the table over torch-npu's operators. None has run on an NPU: what is checked is in tests/kernels/npu_*.py.

Rules: operators are called as ``torch.ops.npu.NAME`` with their required arguments in order and the others by name, as
few as possible (optional ones come and go between versions). Every limit and habit that a call respects is in the
comments here and in the contracts of the tests; both come from the documentation in torch-npu's wheel.
Nothing imports torch_npu: on a machine with NPUs torch loads it by itself, or ``unimega.backend`` does.
"""
