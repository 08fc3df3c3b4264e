"""Norm, attention, FFN and the block: single-device maths over the linears of ``parallel`` and the ops of ``kernels``."""
