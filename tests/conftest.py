"""What all tests share: real recordings where there are some, one thread."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# a red test must stay red, and a busy machine is no reason to be red
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real recordings, never committed: the folder BERGER_DATA names, or ../shared/data beside the checkout."""
    path = Path(os.environ.get("BERGER_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real recordings at {path} (BERGER_DATA)")
    return path
