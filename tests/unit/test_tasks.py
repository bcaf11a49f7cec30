"""Options that a task would ignore are refused by name; their names are real."""

from dataclasses import fields

import pytest

from onebase.config import DataConfig, LoraConfig, OptimConfig, TrainConfig, build
from onebase.errors import ConfigError
from onebase.tasks import UNREAD


def test_every_refused_option_exists():
    known = {item.name for config in (DataConfig, LoraConfig, OptimConfig) for item in fields(config)}
    assert {name.partition("=")[0] for names in UNREAD.values() for name in names} <= known


@pytest.mark.parametrize(
    ("task", "options", "told"),
    [
        ("embed", {"loss_on": "all"}, "task=embed and loss_on: --task embed makes no use of it"),
        ("embed", {"separator": " "}, "task=embed and separator"),
        ("classify", {"pooling": "cls"}, "task=classify and pooling"),
        ("causal", {"similarity_scale": 5.0}, "task=causal and similarity_scale"),
        ("regress", {"recompute": True}, "task=regress and recompute"),
        ("embed", {"init": "eva"}, "task=embed and init=eva: it looks at rows one at a time"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(task, options, told):
    with pytest.raises(ConfigError, match=told):
        build(TrainConfig, {"task": task, **options})


@pytest.mark.parametrize("task", UNREAD)
def test_defaults_suit_every_task(task):
    assert TrainConfig(data=DataConfig(task=task)).data.task == task
