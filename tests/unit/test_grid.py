"""Grids: which values make which runs, their names, and what may not vary."""

import pytest

from onebase.config import TrainConfig, build, flatten
from onebase.errors import ConfigError
from onebase.grid import LISTS, SWEPT, grid, swept_options
from onebase.options import flat_options, opt

COMMON = {"data": "rows.jsonl", "holdout": 3}


def configs(**options):
    return [build(TrainConfig, point.options) for point in grid({**COMMON, **options})]


def test_every_combination_the_last_fastest():
    points = grid({**COMMON, "rank": "4, 8", "lr": "1e-4,5e-4"})
    assert [point.name for point in points] == [
        "rank-4_lr-1e-4", "rank-4_lr-5e-4", "rank-8_lr-1e-4", "rank-8_lr-5e-4",
    ]  # fmt: skip
    assert points[1].varied == {"rank": "4", "lr": "5e-4"}
    assert points[1].options == {**COMMON, "rank": "4", "lr": "5e-4"}
    found = [(c.lora.rank, c.optim.lr) for c in configs(rank="4,8", lr="1e-4,5e-4")]
    assert found == [(4, 1e-4), (4, 5e-4), (8, 1e-4), (8, 5e-4)]
    assert all(c.data.holdout == 3 for c in configs(rank="4,8"))


def test_python_values_make_the_same_grid():
    assert configs(rank=[4, 8], seed=(0, 1)) == configs(rank="4,8", seed="0,1")
    assert [point.name for point in grid({"lr": [0.001, 0.5], "rslora": [True, False]})] == [
        "lr-0.001_rslora-on", "lr-0.001_rslora-off", "lr-0.5_rslora-on", "lr-0.5_rslora-off",
    ]  # fmt: skip


def test_one_value_is_for_all_runs():
    found = configs(rank="4,8", alpha="16", target_modules=["q_proj", "v_proj"], layers="0-3,5", rslora="on")
    assert {(c.lora.alpha, c.lora.target_modules, c.lora.layers, c.lora.rslora) for c in found} == {
        (16.0, ("q_proj", "v_proj"), "0-3,5", True)
    }


def test_values_with_commas_have_semicolons_between_them():
    points = grid({**COMMON, "target_modules": "q_proj,v_proj; all-linear", "layers": "0-1;0,2"})
    assert [point.name for point in points][1:3] == [
        "target_modules-q_proj-v_proj_layers-0-2",
        "target_modules-all-linear_layers-0-1",
    ]
    found = [build(TrainConfig, point.options).lora for point in points]
    assert found[0].target_modules == ("q_proj", "v_proj")
    assert found[2].target_modules == "all-linear"
    assert [one.layers for one in found] == ["0-1", "0,2", "0-1", "0,2"]


def test_switches_and_choices():
    found = configs(rslora="off,ON", init="default,pissa", freeze_a="true,false")
    assert {(c.lora.rslora, c.lora.init, c.optim.freeze_a) for c in found} == {
        (a, b, c) for a in (True, False) for b in ("default", "pissa") for c in (True, False)
    }


REFUSED = {
    "no grid": ({"rank": "4"}, "no option has several values"),
    "twice": ({"rank": "4,8,4"}, "two runs would be the same: rank-4"),
    "batches": ({"rank": "4,8", "batch_size": "4,8"}, "must be the same for all runs"),
    "epochs": ({"rank": "4,8", "epochs": "1,2"}, "these may vary: rank, alpha"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_grid(case):
    options, found = REFUSED[case]
    with pytest.raises(ConfigError, match=found):
        grid({**COMMON, **options})


@pytest.mark.parametrize("options", [{"rank": "4,x"}, {"rslora": "on,perhaps"}, {"init": "default,pisa"}])
def test_a_wrong_value_is_refused_where_its_config_is_built(options):
    with pytest.raises(ConfigError, match=rf"option {next(iter(options))}="):
        configs(**options)


def test_what_may_vary_leaves_rows_and_batches_alone():
    known = flat_options(TrainConfig)
    assert set(SWEPT) <= known.keys()
    assert set(LISTS) < set(SWEPT)
    assert not set(SWEPT) & flat_options(type(TrainConfig().data)).keys()
    assert not {"batch_size", "accumulate", "epochs", "group_prompts", "engine", "recompute"} & set(SWEPT)


def test_the_commands_options_are_trains_and_its_own():
    made = swept_options(TrainConfig(), together=opt(0, "how many"))
    ours, theirs = flat_options(made), flat_options(TrainConfig)
    assert ours.keys() - theirs.keys() == {"together"}
    assert {name: ours[name][2] for name in theirs} == {name: theirs[name][2] for name in theirs}
    assert all(ours[name] == theirs[name] for name in theirs.keys() - set(SWEPT))
    given = {"rank": "4,8", "rslora": True, "lr": 1e-3, "seed": "1,2"}
    assert {name: flatten(build(made, given))[name] for name in given} == given
    plain = {name: value for name, value in flatten(made()).items() if name in theirs}
    with pytest.raises(ConfigError, match="no option has several values"):
        grid(plain)
    first = grid({**plain, "rank": "16,4"})[0].options
    assert build(TrainConfig, first) == TrainConfig()
