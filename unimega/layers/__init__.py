"""Norm, attention, FFN and block: single-device maths over the linears of ``parallel`` and the ops of ``kernels``."""
