import pytest
import torch

pytest.register_assert_rewrite("models", "truths")
torch.set_num_threads(1)  # tensors are small: threads would do little but wait for each other


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
