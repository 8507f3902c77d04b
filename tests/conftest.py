"""For all tests: without a GPU, Triton runs in its interpreter, which it must know when imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
