"""The model that most tests of what goes wrong begin with."""

import pytest
from models import build_model
from torch import nn


@pytest.fixture
def model() -> nn.Module:
    return build_model("llava")
