"""Every family with pre-fusion in it, once for all tests of a file: name or model, its prompts, and the fused view."""

from __future__ import annotations

import pytest

from tests import zoo
from tests.passes.fuse.prefused import fused
from tests.passes.tokens.helpers import IN_SEQUENCE, prompts


@pytest.fixture(scope="module", params=IN_SEQUENCE)
def family(request):
    model = zoo.model(request.param)
    return request.param, model, prompts(request.param), fused(model)


@pytest.fixture(scope="module")
def llava():
    model = zoo.model("llava")
    return model, prompts("llava"), fused(model)
