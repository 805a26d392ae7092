"""`LearnerProtocol`: every learner has all of its methods, and is called as it says."""

import inspect

import pytest

from hf_osd.learning.background import BackgroundLearner
from hf_osd.learning.learner import Learner
from hf_osd.learning.orphan import Orphan
from hf_osd.learning.protocol import LearnerProtocol
from hf_osd.remote.learner import RemoteLearner

METHODS = {name: method for name, method in vars(LearnerProtocol).items() if name[0] != "_" and callable(method)}


@pytest.mark.parametrize("kind", [Learner, BackgroundLearner, Orphan, RemoteLearner])
def test_every_learner_is_called_alike(kind):
    assert len(METHODS) == 12
    for name, method in METHODS.items():
        asked = inspect.signature(method).parameters
        has = inspect.signature(getattr(kind, name)).parameters
        assert list(asked) == list(has)[: len(asked)], name
        assert [p.default for p in asked.values()] == [p.default for p in list(has.values())[: len(asked)]], name
        assert all(p.default is not p.empty for p in list(has.values())[len(asked) :]), name
