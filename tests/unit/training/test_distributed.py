"""Several processes do what one does: the split of rows, the sums, and the base in parts.

Started by torchrun this file is the processes (`checks`), and leaves what each of them found for the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapters import trained
from onebase.adapters.adapter import Origin
from onebase.adapters.injection import eject, inject, new_adapter, trainable, use
from onebase.config import LoraConfig, OptimConfig
from onebase.data.template import Encoded
from onebase.device import pick_device
from onebase.errors import ConfigError
from onebase.evaluation import mean_loss
from onebase.models.base import wrap_base
from onebase.models.scoring import Scorer, Way, scorer
from onebase.training import distributed
from onebase.training.distributed import (
    World,
    base_digests,
    hash_ahead,
    joined,
    local_bytes,
    shard,
    shares,
    spread,
)
from onebase.training.optim import make_optimizer
from onebase.training.step import train_step
from tiny import tiny

pytestmark = pytest.mark.slow

LENGTHS = (17, 4, 9, 4, 12, 6, 8)
WAYS = ("engine", "packed", "padded")


def some_rows():
    """Rows of odd lengths; the second half begins as the first row does."""
    draw = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 96, (length,), generator=draw).tolist() for length in LENGTHS]
    ids = [drawn[0][:3] + row[3:] if number > 3 else row for number, row in enumerate(drawn)]
    return [Encoded(n + 1, row, [i > 1 and i % 3 > 0 for i in range(len(row))]) for n, row in enumerate(ids)]


def learns(way, world, base=None):
    """Three steps and a held-out loss: every number that came out, and the parameters at the end."""
    base = base or wrap_base(tiny("llama").double())
    adapter = trained(base.model, LoraConfig(rank=4, alpha=8))
    inject(base.model, adapter).double()
    parameters = trainable(base.model, "default")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = make_optimizer(parameters, OptimConfig(lr=1e-3, eps=1e-6))
    score = spread(scorer(base, Way(way), "default"), world)
    rows = some_rows()
    batches = [rows[:4], rows[4:6], rows[6:]]  # the last leaves nothing for a second process
    numbers = []
    with use(base.model):
        for _ in range(3):
            done = train_step(score.loss, parameters, optimizer, batches, 1.0, world)
            numbers += [done.loss, done.grad_norm, done.loss_tokens, done.tokens]
        numbers.append(world.total(mean_loss(score, rows, 3)[0]))
    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    eject(base.model)
    return torch.tensor(numbers, dtype=torch.float64), flat


def apart(found, expected):
    """The largest relative differences of the numbers and of the parameters."""
    numbers = ((found[0] - expected[0]) / expected[0]).abs().max()
    return [float(numbers), float((found[1] - expected[1]).norm() / expected[1].norm())]


def sharded(world, way):
    base = wrap_base(tiny("llama").double())
    before, whole = base_digests(base.model), local_bytes(base.model)
    shard(base.model, world)
    found = learns(way, world, base)
    unchanged = base_digests(base.model) == before
    return [*apart(found, learns(way, World())), local_bytes(base.model) / whole, unchanged]


def gradients(world):
    """Of three parameters: one with a gradient everywhere, one in the second process alone, one nowhere."""
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.full((2, 2), 1.0 + world.rank)
    parameters[1].grad = torch.arange(3.0) if world.rank == 1 else None
    world.sum_gradients(parameters)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def disagreement(world, facts):
    try:
        world.agree(facts)
    except ConfigError as error:
        return error.found
    return None


def drawn(world):
    seen = []
    for step in (0, 1, 0):
        world.reseed(4, step)
        seen.append(float(torch.rand(())))
    return seen


def checks(folder):
    """What each process does; its findings go to a file of its own."""
    torch.set_num_threads(1)
    with joined() as world:
        copied = torch.full((2,), float(world.rank))
        world.copy_first([copied])
        found = {
            "world": [world.rank, world.size, distributed.launched_rank()],
            "ways": {way: apart(learns(way, world), learns(way, World())) for way in WAYS},
            "gradients": gradients(world),
            "total": [world.total(world.rank + 0.1), world.any(world.rank == 1), world.any(False)],
            "text": world.first_says(f"né {world.rank}"),
            "copied": copied.tolist(),
            "agrees": disagreement(world, {"rank": 4, "names": ("a", "b")}),
            "disagrees": disagreement(world, {"rank": world.rank, "lr": 1}),
            "drawn": drawn(world),
            "sharded": {way: sharded(world, way) for way in WAYS[1:]},
        }
        Path(folder, f"{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The findings of two processes."""
    folder = tmp_path_factory.mktemp("pair")
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def test_two_processes_learn_what_one_does(pair):
    for rank, found in enumerate(pair):
        assert found["world"] == [rank, 2, rank]
        for way in WAYS:  # packed and padded sum their loss in float32
            bound = 1e-9 if way == "engine" else 1e-6
            assert max(found["ways"][way]) < bound, (rank, way)


def test_a_sharded_base_learns_what_a_whole_one_does(pair):
    for found in pair:
        for way in WAYS[1:]:
            numbers, parameters, held, unchanged = found["sharded"][way]
            assert max(numbers, parameters) < 1e-6
            assert 0.45 < held < 0.55
            assert unchanged


def test_what_is_exchanged(pair):
    for rank, found in enumerate(pair):
        assert found["gradients"] == [[[3.0, 3.0], [3.0, 3.0]], [0.0, 1.0, 2.0], None]
        assert found["total"] == [pytest.approx(1.2, abs=1e-15), True, False]
        assert found["text"] == "né 0"
        assert found["copied"] == [0.0, 0.0]
        assert found["agrees"] is None
        told = "another process has other" if rank == 0 else "rank is 1, in the first process 0"
        assert told in found["disagrees"]


def test_each_process_and_step_draws_its_own(pair):
    (a, b, again), (c, d, _) = (found["drawn"] for found in pair)
    assert a == again
    assert len({a, b, c, d}) == 4


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_shares_cover_all_rows_and_weigh_the_same(lengths, count):
    runs = shares(lengths, count)
    assert len(runs) == count
    assert [place for run in runs for place in run] == list(range(len(lengths)))
    for run in runs:
        weight = sum(lengths[place] for place in run)
        assert abs(weight - sum(lengths) / count) <= max(lengths, default=0)


def test_shares_by_hand():
    assert shares([5, 5, 5, 5], 2) == [range(0, 2), range(2, 4)]
    assert shares([1, 1, 1, 9], 2) == [range(0, 3), range(3, 4)]
    assert shares([90, 1, 1], 3) == [range(0, 0), range(0, 1), range(1, 3)]
    assert shares([], 2) == [range(0, 0), range(0, 0)]


def test_every_process_scores_its_share_in_the_order_of_the_way():
    rows = some_rows()
    seen = []

    def loss(own):
        seen.append([row.row for row in own] if any(sum(row.loss) for row in own) else [])
        return torch.tensor(0.0)

    def longest_first(rows, size):
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
        return [order[start : start + size] for start in range(0, len(order), size)]

    score = Scorer(loss, longest_first)
    for rank in range(3):
        spread(score, World(rank, 3)).loss(rows)

    assert [row for share in seen for row in share] == [1, 5, 3, 7, 6, 2, 4]
    seen.clear()
    for rank in range(2):
        spread(score, World(rank, 2)).loss(rows[:1])
    assert sorted(seen) == [[], [1]]  # the other gets a row without loss


def test_alone_nothing_changes():
    world, score = World(), Scorer(torch.tensor, lambda rows, size: [])
    parameter = nn.Parameter(torch.zeros(2))
    before = torch.get_rng_state()
    world.sum_gradients([parameter])
    world.reseed(0, 0)
    world.agree({"x": object()})
    world.wait()
    assert parameter.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    assert (world.total(0.1), world.any(True), world.first_says("x")) == (0.1, True, "x")
    assert spread(score, world) is score
    with joined() as found:
        assert found == world


def test_a_lost_process_is_told_in_one_line():
    def broken(tensor):
        raise RuntimeError("Connection closed by peer\nmore")

    with pytest.raises(distributed.ProcessLost, match=r"one of them has ended \(Connection closed by peer\)"):
        distributed._exchange(broken, torch.zeros(1))


def test_a_process_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == torch.device("cuda:1")


def test_hashing_ahead_gives_the_bases_digests_whatever_is_put_onto_it_meanwhile():
    base = wrap_base(tiny("llama"))
    before = base_digests(base.model)
    ahead = hash_ahead(base.model)
    inject(
        base.model,
        new_adapter(base.model, LoraConfig(rank=2, modules_to_save=("lm_head",)), 0, Origin()),
        "x",
    )
    found = ahead.result()
    assert found.digests == before
    assert found.seconds > 0


if __name__ == "__main__":
    checks(sys.argv[1])
    distributed.leave(0)
