"""What every test needs: one thread (the suite runs in parallel), a fixed seed, quiet transformers."""

import pytest
import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
