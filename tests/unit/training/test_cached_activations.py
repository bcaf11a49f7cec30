"""--cache-activations: the same run, resumable bit for bit, and an error wherever nothing could be kept."""

import json

import pytest
import torch

from onebase.errors import ConfigError
from onebase.storage.format import load_adapter
from onebase.training.run import foresee, train
from onebase.training.sweep import sweep
from texts import QUESTIONS, save_base, text_base, write_rows

pytestmark = pytest.mark.slow

TOP = {"layers": "1", "cache_activations": True}
SMALL = {"rank": 2, "lr": 1e-2, "batch_size": 4, "epochs": 2.0, "holdout": 3, "samples": 0, "save_every": 3}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", QUESTIONS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_is_the_same_and_goes_on_bit_for_bit(rows, tmp_path):
    base, known = text_base(), {**SMALL, "data": rows}
    plain = train(base, output=str(tmp_path / "plain"), **known, layers="1")
    whole = train(base, output=str(tmp_path / "whole"), **known, **TOP)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert whole.progress.step == plain.progress.step > 8  # several epochs, most of them read back
    assert not [
        path for path in (tmp_path / "whole").iterdir() if path.name.startswith(".") and path.name != ".lock"
    ]

    calls = iter([False] * 4)
    train(base, stop=lambda: next(calls, True), output=str(tmp_path / "cut"), **known, **TOP)
    train(base, output=str(tmp_path / "cut"), resume=True)
    one, other = (load_adapter(tmp_path / name, base).tensors() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_plan_tells_what_is_kept(rows, folder):
    plan, _ = foresee({**SMALL, "data": rows, "base": str(folder), **TOP})
    assert plan.way.startswith("engine; layers 0-0 computed once, ")
    assert plan.way.endswith(" MB on disk while it runs")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": ""}, "begins at the first layer"),
        ({"engine": "packed"}, "only the engine keeps states"),
        ({"dora": True}, "only the engine keeps states"),
    ],
)
def test_where_nothing_can_be_kept_it_is_an_error(rows, tmp_path, options, told):
    with pytest.raises(ConfigError, match=told):
        train(text_base(), data=rows, output=str(tmp_path / "run"), **{**SMALL, **TOP, **options})
    assert not (tmp_path / "run").exists()


def test_a_sweep_refuses_it(rows, tmp_path):
    with pytest.raises(ConfigError, match="pass through the base together"):
        sweep(text_base(), data=rows, output=str(tmp_path / "runs"), **{**SMALL, **TOP, "rank": [2, 4]})
