"""The demo model, forty questions, its judge, and what that says of a worse model."""

from __future__ import annotations

import pytest

from svlm.calib.dataset import CalibrationSet, Sample
from svlm.calib.encode import Encoder
from svlm.calib.judge import Judge, Measurement
from svlm.compress.anatomy import ModelView
from svlm.compress.storage import load_model
from tests.judged import BATCH, noisy


@pytest.fixture(scope="module")
def original() -> ModelView:
    return load_model("demo")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return CalibrationSet.load("demo", fit=4, check=40).check


@pytest.fixture(scope="module")
def worse() -> ModelView:
    return noisy()


@pytest.fixture(scope="module")
def judge(original: ModelView, samples: list[Sample]) -> Judge:
    return Judge(samples, Encoder(original.processor), original, batch_size=BATCH)


@pytest.fixture(scope="module")
def measured(judge: Judge, worse: ModelView) -> Measurement:
    return judge.measure(worse)
