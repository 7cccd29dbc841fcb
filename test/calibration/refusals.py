"""What quantize_ says when it refuses."""

from typing import Any

import pytest
from models import assert_unchanged, snapshot
from torch import nn

from mbq_ao import mbq_config, quantize_


def refused(
    model: nn.Module,
    calib_data: Any,
    exception: type[BaseException] = ValueError,
    filter_fn: Any = None,
    work_dir: Any = None,
    **options: Any,
) -> str:
    """The error's text, after checking that the model is what it was."""
    before = snapshot(model)
    with pytest.raises(exception) as caught:
        config = mbq_config(calib_data, **{"recipe": "mbq", "group_size": 32, "n_grid": 2, **options})
        quantize_(model, config, filter_fn, progress=False, work_dir=work_dir)
    assert_unchanged(model, before)
    return str(caught.value)
