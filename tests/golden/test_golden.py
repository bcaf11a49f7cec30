"""The loss curves of many settings are the committed ones (`losses.json`, written by `make.py`)."""

import json

import pytest
import torch
from make import LOSSES, SETTINGS, STEPS, VARIANTS, WAYS, losses

COMMITTED = json.loads(LOSSES.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_setting_is_committed():
    assert list(COMMITTED) == SETTINGS
    assert {name for variants in WAYS.values() for name in variants} == VARIANTS.keys()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_curve_is_the_committed_one(setting):
    if setting.endswith(" dropout") and not torch.backends.mkl.is_available():
        pytest.skip("the committed masks are MKL's")
    found = losses(setting)
    assert len(found) == STEPS
    assert found == pytest.approx(COMMITTED[setting], rel=1e-6)


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"dropout"}))
def test_all_ways_have_the_same_curve(variant):
    """Not with dropout, whose masks are drawn in another order by each way."""
    first, *others = [COMMITTED[f"{way} {variant}"] for way, variants in WAYS.items() if variant in variants]
    for other in others:
        assert other == pytest.approx(first, rel=5e-6)


def test_the_settings_differ():
    """A setting that does nothing would have the plain curve; computing twice must."""
    plain = COMMITTED["engine lora"]
    assert COMMITTED["engine recompute"] == pytest.approx(plain, rel=1e-12)
    for variant in set(WAYS["engine"]) - {"lora", "recompute"}:
        assert COMMITTED[f"engine {variant}"][-1] != pytest.approx(plain[-1], rel=1e-4), variant
