"""What `onebase inspect` says of updates that are not plain."""

from pathlib import Path

import pytest

from adapters import trained
from onebase.cli.inspect import describe
from onebase.config import LoraConfig
from onebase.storage.format import save_adapter
from tiny import tiny


def test_the_norm_of_an_update_of_experts(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, target_modules=[], target_parameters=["experts.down_proj"])
    adapter = trained(tiny("mixtral"), config)
    save_adapter(adapter, tmp_path / "run")
    facts = describe(adapter, tmp_path / "run")
    low = next(iter(adapter.lowrank.values()))
    assert low.blocks > 1
    pairs = zip(low.B.chunk(low.blocks), low.A.chunk(low.blocks), strict=True)
    squares = sum(float((b @ a).square().sum()) for b, a in pairs)
    assert facts["modules"][0]["norm"] == pytest.approx(abs(low.scale) * squares**0.5, rel=1e-5)
