"""What the fork server imports once, so that a rank starts in milliseconds. Starts no threads and no process group."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

import torch._dynamo  # noqa: E402  (2 s, and every optimizer imports it)

from unimega import backend  # noqa: E402

backend.use("cpu")  # these tests are about gloo, also where there is a GPU; tests/gpu is about that

import unimega.training.loop  # noqa: E402, F401
