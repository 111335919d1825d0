"""What all tests share: one seed, nothing left of a process group, property tests that draw the same examples."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch import distributed as dist

settings.register_profile("l3d_pl", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("l3d_pl")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A test that runs a strategy, or sets a seed, leaves its process group and variables of the environment."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    left = "MASTER_ADDR MASTER_PORT NODE_RANK LOCAL_RANK RANK WORLD_SIZE PL_GLOBAL_SEED PL_SEED_WORKERS"
    for name in left.split():
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
