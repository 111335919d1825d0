"""What all tests share: one seed, and property tests that draw the same examples everywhere."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("l3d_pl", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("l3d_pl")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
