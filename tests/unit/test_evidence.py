"""benchmarks/evidence: what is run next, what a row says, the two ways to train, the page that the rows make."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from benchmarks.evidence.footprint import all_trained
from benchmarks.evidence.learn import (
    Course,
    fit,
    learner,
    open_base,
    optim_config,
    own_weights,
    require_same_start,
)
from benchmarks.evidence.lookup import Pair
from benchmarks.evidence.pictures import PICTURES, svg
from benchmarks.evidence.plan import (
    ALL_RATES,
    DEFAULT,
    FORMER_DEFAULT,
    FULL,
    LONG,
    LORA,
    METHODS,
    SHORT,
    Job,
    rates_from,
    search,
    wanted,
)
from benchmarks.evidence.quantise import rounded, stored_bytes
from benchmarks.evidence.render import PAGE, page
from benchmarks.evidence.render import PICTURES as DRAWN
from benchmarks.evidence.rows import COMMITTED, Rows
from benchmarks.evidence.settings import QUICK, REAL, TUNING_SEED
from benchmarks.evidence.tables import TABLES
from benchmarks.evidence.tasks import METRICS, TASKS, number, open_labelled, open_pairs, open_task, parted
from benchmarks.evidence.text import verdict
from transformers import get_linear_schedule_with_warmup

from onebase.adapters.targets import match
from onebase.config import LoraConfig, OptimConfig
from onebase.data.pack import step_rows
from onebase.data.pairs import columns
from onebase.errors import MissingFile
from onebase.models.embedder import Embedder
from onebase.training.optim import usual_lr
from onebase.training.work import Load, product_flop, read_decoder, step_products


@pytest.fixture(scope="module")
def base():
    return open_base(QUICK)


@pytest.fixture(scope="module")
def task(base):
    return open_task("intent", QUICK, base, None)


def course(base, task, config):
    return Course(base, lambda: open_base(QUICK), task.train, task.test, config)


class Fake:
    """Rows that exist in memory only."""

    def __init__(self, found=()):
        self.found = dict(found)

    def get(self, job):
        return self.found.get(job)


# -- the search for a learning rate


def test_a_search_begins_with_the_start_and_its_neighbours():
    assert search({}, 1e-3) == ([1e-3, 3e-4, 3e-3], None)
    assert search({1e-3: 2.0}, 1e-3) == ([3e-4, 3e-3], None)


@pytest.mark.parametrize(
    ("losses", "wanted_rates", "best"),
    [
        ({3e-4: 3.0, 1e-3: 2.0, 3e-3: 4.0}, [], 1e-3),  # the best is inside
        ({3e-4: 1.0, 1e-3: 2.0, 3e-3: 4.0}, [1e-4], None),  # at the lower edge: one further
        ({3e-4: 3.0, 1e-3: 2.0, 3e-3: 1.0}, [1e-2], None),
        ({3e-4: 3.0, 1e-3: 2.0, 3e-3: 1.0, 1e-2: float("inf")}, [], 3e-3),  # it diverged there
        ({3e-4: 5.0, 1e-3: 4.0, 3e-3: 3.0, 1e-2: 2.0, 3e-2: 1.0}, [], 3e-2),  # no third move
    ],
)
def test_a_search_goes_on_while_the_best_stands_at_the_edge(losses, wanted_rates, best):
    assert search(losses, 1e-3) == (wanted_rates, best)


def test_a_search_ends_where_the_grid_does():
    losses = {ALL_RATES[-1]: 1.0, ALL_RATES[-2]: 2.0, ALL_RATES[-3]: 3.0}
    assert search(losses, ALL_RATES[-2]) == ([], ALL_RATES[-1])


# -- what is run next


def run_all(only=frozenset(), quiet=False):
    """The jobs in the order in which they would run, each with a loss that makes the start the best rate."""
    view, order = Fake(), []
    while job := next(wanted(QUICK, view, only, quiet), None):
        start = METHODS[job.method].start if job.method in METHODS else 0
        view.found[job] = {"tune": abs(job.lr - start) + 1.0}
        order.append(job)
    return order


def test_reported_runs_follow_their_search_and_have_another_seed():
    order = run_all()
    assert len(order) == len(set(order))
    for place, job in enumerate(order):
        for leg in (SHORT, LONG):
            if job.kind != leg.final or job.method not in (LORA, FULL):
                continue
            tried = [j for j in order[:place] if j[:3] == (leg.tune, job.task, job.method)]
            searched = [j for j in tried if j.lr != FORMER_DEFAULT]  # which is beside the grid
            assert len(searched) == 3
            assert {j.lr for j in searched} == set(rates_from(METHODS[job.method].start))
            assert {j.seed for j in tried} == {TUNING_SEED} != {job.seed}
            assert job.lr == METHODS[job.method].start


def test_timed_runs_wait_to_be_asked_for():
    assert not [job for job in run_all() if job.kind == "step"]
    assert {job.kind for job in run_all(only=frozenset({3}))} == {"step"}
    assert run_all(quiet=True)[0].kind == "step"


def test_usual_runs_are_as_long_as_those_of_onebase_train():
    usual = OptimConfig()
    assert (REAL.usual_epochs, REAL.usual_batch) == (usual.epochs, usual.batch_size)
    assert (QUICK.usual_batch, usual.lr) == (usual.batch_size, 0)
    assert usual_lr(576) == DEFAULT == 1e-3


def test_only_runs_what_a_claim_needs():
    assert {job.kind for job in run_all(only=frozenset({2}))} == {"sizes"}
    longer = {"long-base", "long", "long-final"}
    assert {job.kind for job in run_all(only=frozenset({7}))} == {"tune", "final", *longer, "swap"}


def test_a_key_holds_what_decides_the_numbers_and_nothing_else():
    tune, timed = Job("tune", "e2e", LORA, 1e-3, 1), Job("step", "e2e", "engine float32")
    assert tune.key(REAL) != tune.key(replace(REAL, steps=21))
    assert tune.key(REAL) == tune.key(replace(REAL, timed_steps=7))
    final = Job(LONG.final, "e2e", LORA, 1e-3, 1)
    assert final.key(REAL) not in {final.key(replace(REAL, **{f: 7})) for f in ("long_answers", "long_steps")}
    assert timed.key(REAL) != timed.key(replace(REAL, timed_steps=7))
    keys = {tune._replace(method=method).key(REAL) for method in METHODS}
    assert len(keys) == len(METHODS)


# -- rows


def test_rows_are_found_again_and_a_cut_line_does_no_harm(tmp_path):
    path = tmp_path / "rows.jsonl"
    one, two = Job("base"), Job("sizes", method=LORA)
    Rows(path, QUICK).add(one, {"loss": 1.5})
    with path.open("a") as file:
        file.write('{"key": "cut')
    rows = Rows(path, QUICK)
    assert rows.get(one) == {"loss": 1.5}
    rows.add(two, {"trained": 3})
    again = Rows(path, QUICK)
    assert (again.get(one), again.get(two)) == ({"loss": 1.5}, {"trained": 3})
    assert [row["kind"] for row in again.valid()] == ["base", "sizes"]
    assert Rows(path, REAL).valid() == []
    assert {"torch", "cpu", "threads"} <= set(again.row(one)["machine"])


def test_a_run_is_one_processs_alone(tmp_path):
    rows, job = Rows(tmp_path / "rows.jsonl", QUICK), Job("base")
    with rows.claimed(job, tmp_path) as first, Rows(rows.path, QUICK).claimed(job, tmp_path) as second:
        assert (first, second) == (True, False)
    rows.add(job, {})
    with rows.claimed(job, tmp_path) as done:
        assert not done


# -- tasks


def test_parts_share_no_prompt():
    raw = parted([(f"p{n % 40}", f"a{n}") for n in range(200)], held_out=10)
    prompts = [{prompt for prompt, _ in part} for part in raw]
    assert [len(part) for part in prompts] == [30, 5, 5]
    assert len(set.union(*prompts)) == 40
    assert sum(map(len, raw)) == 200


def test_held_out_texts_with_classes_were_not_learnt(base):
    rows = open_labelled("asks", QUICK, base, None)
    texts = [{tuple(row.ids) for row in part} for part in (rows.train, rows.tune, rows.test)]
    assert [len(part) for part in (rows.train, rows.tune, rows.test)] == [64, 16, 32]
    assert not texts[2] & (texts[0] | texts[1])
    assert rows.head.labels == ("address", "cancel", "exchange", "refund", "repair", "tracking")


def test_missing_rows_name_the_file_and_the_option(base, tmp_path):
    with pytest.raises(MissingFile, match=r"e2e/valid\.jsonl(.|\n)*--data"):
        open_task("e2e", REAL, base, tmp_path)


def test_answers_are_scored_by_the_last_number():
    assert number("so 2 + 2 = 4\n#### 1,234.") == "1234"
    assert number("about 4") is None
    references = [["#### 4"], ["#### 5"], ["#### 6"]]
    assert METRICS["number"][1](["#### 4", "5", "#### 7"], references) == pytest.approx(100 / 3)
    assert METRICS["exact"][1](["yes", "no"], [["yes"], ["yes"]]) == 50


# -- the two ways to train


def plainly(base, rows, config, seed):
    """Full fine-tuning as one writes it by hand: a row at a time, torch's AdamW, transformers' schedule."""
    model = own_weights(open_base(QUICK)).model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, config.max_steps)
    losses = []
    for step in range(config.max_steps):
        chosen = [rows[i] for i in step_rows(len(rows), config.batch_size, 1, seed, step)[0]]
        sums, count = 0, 0
        for row in chosen:
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
            labels = torch.tensor([t if on else -100 for t, on in zip(row.ids, row.loss, strict=True)][1:])
            sums = sums + F.cross_entropy(logits, labels, reduction="sum")
            count += int((labels != -100).sum())
        optimizer.zero_grad()
        (sums / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float((sums / count).detach()))
    return losses


def test_full_fine_tuning_is_what_one_writes_by_hand(base, task):
    config = OptimConfig(lr=1e-3, max_steps=4, batch_size=4)
    with learner(FULL, 3, course(base, task, config)) as made:
        found = fit(made, task.train, config, 3)
    assert found.losses == pytest.approx(plainly(base, task.train, config, 3), rel=1e-4)
    assert found.losses[-1] < found.losses[0]
    assert made.proof == {"tensors": 20, "changed": 20}
    assert all(p.grad is None for p in made.parameters.values())


def test_both_start_from_the_base_and_lora_leaves_it(base, task):
    config = optim_config(METHODS[LORA], 1e-2, 3, QUICK.batch_size)
    found = {}
    for name in (LORA, FULL):
        with learner(name, 1, course(base, task, config)) as made:
            found[name] = fit(made, task.train, config, 1)
            if name == LORA:
                assert made.way.name == "engine"
                assert made.adapter().tensors()
    assert found[LORA].losses[0] == pytest.approx(found[FULL].losses[0], rel=1e-5)
    assert found[LORA].losses[1:] != pytest.approx(found[FULL].losses[1:], rel=1e-5)
    assert found[LORA].tokens == found[FULL].tokens
    with learner(LORA, 1, course(base, task, config)) as made:
        fit(made, task.train, config, 1)
    assert made.proof == {"tensors": 20, "changed": 0, "off_equal": True, "ejected_equal": True}


def test_another_start_ends_the_program(base, task):
    rows = task.train[:4]
    with pytest.raises(SystemExit, match="no comparison"):
        require_same_start([1.0], base, rows)


def test_flop_of_all_weights_is_three_products_and_of_lora_two_thirds(base):
    decoder = read_decoder(base.model, match(base.model, LoraConfig(rank=8)))
    frozen = decoder._replace(
        linears=tuple(one._replace(gradient=True) for one in decoder.linears), head=None
    )
    full = all_trained(frozen)
    load = Load(10, 0, 0)
    totals = [sum(map(product_flop, step_products(one, load).values())) for one in (frozen, full)]
    weights = sum(one.inputs * one.outputs for one in decoder.linears)
    factors = sum(8 * (one.inputs + one.outputs) for one in decoder.linears)
    assert totals == [10 * (4 * weights + 6 * factors), 10 * 6 * weights]


# -- rounding


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 0), (4, 16)])
def test_rounding_errs_by_half_a_step_of_its_block(bits, block):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    blocks = weight.reshape(6, -1, block or 64)
    step = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    off = (rounded(weight, bits, block).reshape(blocks.shape) - blocks).abs()
    assert (off <= 0.5 * step + 1e-3 * blocks.abs()).all()  # 1e-3: the scale in float16
    assert off.max() > 0.3 * step.min()
    assert rounded(weight, bits, block).unique().numel() <= (2**bits - 1) * step.numel()


def test_stored_bytes_count_integers_scales_and_the_rest(base):
    linear = sum(p.numel() for n, p in base.model.named_parameters() if n.endswith("proj.weight"))
    rest = base.parameters - linear
    assert stored_bytes(base.model, 4, 16) == linear // 2 + 2 * linear // 16 + 2 * rest


# -- texts that belong together


def test_pairs_share_no_prompt_between_parts(base):
    rows = open_pairs("alike", QUICK, base.with_embedder(Embedder()), None)
    texts = [{text for row in part for text in map(tuple, columns([row]))} for part in rows]
    assert all(len(part) > 4 for part in rows)
    assert not texts[0] & (texts[1] | texts[2])
    anchors, positives = columns(rows.test)
    assert len(set(anchors)) == len(anchors)  # one row each
    assert not set(anchors) & set(positives)


def test_both_methods_learn_pairs_from_one_start(base):
    plain = base.with_embedder(Embedder())
    rows = open_pairs("alike", QUICK, plain, None)
    config = optim_config(METHODS[LORA], 3e-3, 3, 4)
    made = Course(plain, lambda: open_base(QUICK).with_embedder(Embedder()), rows.train, rows.test, config)
    losses = {}
    for name in (LORA, FULL):
        with learner(name, 0, made) as learning:
            losses[name] = fit(learning, rows.train, config, 0).losses
    assert losses[LORA][0] == pytest.approx(losses[FULL][0], rel=1e-5)
    assert losses[LORA][1:] != pytest.approx(losses[FULL][1:], rel=1e-5)


# -- the page


def test_a_verdict_needs_every_seed():
    assert verdict(Pair([1.0, 2.0], [1.5, 2.5])) == "LoRA better in 2 of 2 seeds"
    assert (
        verdict(Pair([1.0, 2.0], [1.5, 2.5]), less_is_better=False)
        == "full fine-tuning better in 2 of 2 seeds"
    )
    assert (
        verdict(Pair([1.0, 3.0], [1.5, 2.5])) == "mixed: LoRA better in 1, full fine-tuning in 1 of 2 seeds"
    )
    # a difference of nothing is nobody's
    assert verdict(Pair([0.0, 4.2, 0.0], [0.0, 0.0, 0.0]), False) == "LoRA better in 1 of 3 seeds, level in 2"
    assert verdict(Pair([1.0, 1.0], [1.0, 1.0])) == "level in 2 of 2 seeds"
    assert verdict(Pair([2.0], [1.0]), words=("lower", "lower")) == "full fine-tuning lower in 1 of 1 seed"
    assert verdict(Pair([], [])) == "not run"


def test_a_page_without_rows_says_so(tmp_path):
    text = page(Rows(tmp_path / "none.jsonl", REAL))
    assert text.count("ot run") > 20
    assert all(TABLES[name](Rows(tmp_path / "none.jsonl", REAL)) for name in TABLES)


def test_the_committed_page_is_what_its_rows_make():
    assert PAGE.read_text(encoding="utf-8") == page(Rows(COMMITTED, REAL)), (
        "python -m benchmarks.evidence render"
    )
    assert {path.name for path in DRAWN.glob("evidence-*.svg")} == {
        f"evidence-{name}.svg" for name in PICTURES
    }


def test_committed_rows_are_whole_and_of_this_code():
    lines = COMMITTED.read_text(encoding="utf-8").splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys))
    assert {row["key"] for row in Rows(COMMITTED, REAL).valid()} == set(keys)


def test_pictures_are_the_same_bytes_each_time():
    rows = Rows(COMMITTED, REAL)
    assert svg(rows, "matrix") == svg(rows, "matrix")


def test_every_task_has_a_measure():
    assert all(task.metric in METRICS for task in TASKS.values())
