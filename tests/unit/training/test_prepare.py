"""What must hold before the first step: the rows, the gates, the targets, and how rows become batches."""

import pytest

from onebase.config import TrainConfig, build
from onebase.data.template import PromptFormat
from onebase.errors import BaseError, ConfigError, GateError
from onebase.models.base import wrap_base
from onebase.models.scoring import Way
from onebase.training.prepare import prepare, read_data, settled, tokenizer_of
from texts import CHATS, QUESTIONS, TEXTS, text_base, text_model, tokenizer, write_rows
from tiny import tiny


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.fixture
def ready(base, tmp_path):
    """`prepare` on some rows."""

    def make(rows=QUESTIONS, **options):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        return prepare(base, build(TrainConfig, {"data": path, "holdout": 0, **options}))

    return make


def test_rows_are_split_encoded_and_counted(ready):
    found = ready(holdout=5, seed=3)
    data = found.data
    assert (len(data.train), len(data.valid)) == (22, 5)
    assert sorted(e.row for e in [*data.train, *data.valid]) == list(range(1, 28))
    assert [row.row for row in data.train_rows.rows] == [example.row for example in data.train]
    assert [row.row for row in data.valid_rows.rows] == [example.row for example in data.valid]
    assert data.summary.rows == 22
    assert data.summary.tokens == sum(len(row.ids) for row in data.train_rows.rows)
    assert data.form == PromptFormat(separator="\n")
    assert (found.way.name, found.allowed) == ("engine", ())
    assert ready(holdout=5, seed=4).data.valid != data.valid


@pytest.mark.parametrize(("width", "usual"), [(32, 1e-3), (2304, 5e-4)])
def test_the_rate_is_the_bases_usual_one_unless_it_is_named(width, usual, base, monkeypatch):
    monkeypatch.setattr(base.model.config, "hidden_size", width)
    for options, rate in (({}, usual), ({"lr": 0.25}, 0.25)):
        assert settled(base, build(TrainConfig, options)).optim.lr == pytest.approx(rate)


def test_the_answers_end_is_learnt(ready, base):
    for rows, options in ((QUESTIONS, {}), (CHATS, {}), (QUESTIONS, {"chat": True}), (TEXTS, {})):
        for row in ready(rows, **options).data.train_rows.rows:
            last = max(index for index, carries in enumerate(row.loss) if carries)
            assert row.ids[last] == base.stop_ids[0]


def test_a_validation_file_needs_no_split(ready, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", QUESTIONS[:4])
    data = ready(validation=other, holdout=0.5).data
    assert (len(data.train), len(data.valid)) == (27, 4)


def test_groups_stay_together(ready):
    data = ready(holdout=2, split_by="prompt").data
    assert len(data.valid) == 6
    assert not {e.prompt for e in data.train} & {e.prompt for e in data.valid}


def test_the_digest_tells_what_is_trained_on(ready):
    """Rows, their order, the loss mask and the split change it; where the file lies does not."""
    digests = [
        ready().data.digest,
        ready(QUESTIONS[::-1]).data.digest,
        ready(QUESTIONS[:-1]).data.digest,
        ready(loss_on="all").data.digest,
        ready(holdout=5).data.digest,
        ready([QUESTIONS[0] | {"completion": "No."}, *QUESTIONS[1:]]).data.digest,
    ]
    assert len(set(digests)) == len(digests)
    assert ready().data.digest == digests[0]


def test_all_gates_that_fail_are_told_at_once(ready):
    rows = [{"prompt": "A", "completion": ""}, *QUESTIONS]
    with pytest.raises(
        GateError, match=r"2 gates failed:(.|\n)*no-loss(.|\n)*no-eos(.|\n)*--allow no-loss,no-eos"
    ):
        ready(rows, teach_eos=False)
    with pytest.raises(GateError, match=r"1 gate failed:(.|\n)*no-eos"):
        ready(rows, teach_eos=False, allow="no-loss")
    assert ready(rows, teach_eos=False, allow="no-loss,no-eos,double-bos").allowed == ("no-loss", "no-eos")


def test_uneven_targets_are_a_gate(tmp_path):
    model = text_model()
    model.model.layers[0].mlp.gate_proj = None  # a layer that has one target less
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    options = {"data": path, "target_modules": "q_proj,gate_proj", "engine": "padded"}
    base = wrap_base(model, tokenizer())
    with pytest.raises(
        GateError, match=r"uneven-targets: .*gate_proj(.|\n)*fix: (.|\n)*--allow uneven-targets"
    ):
        prepare(base, build(TrainConfig, options))
    found = prepare(base, build(TrainConfig, options | {"allow": "uneven-targets"}))
    assert found.allowed == ("uneven-targets",)
    assert len(found.coverage.targets) == 3


def test_special_tokens_need_a_trained_embedding(tmp_path):
    """An added token whose row of the embedding was never trained is refused, unless the run trains it."""
    words, model = tokenizer(), text_model()
    model.get_input_embeddings().weight.data[words.convert_tokens_to_ids("<|im_end|>")] = 0
    base, path = wrap_base(model, words), write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    with pytest.raises(GateError, match=r"untrained-special: (.|\n)*im_end"):
        prepare(base, build(TrainConfig, {"data": path}))
    assert prepare(base, build(TrainConfig, {"data": path, "modules_to_save": "embed_tokens"})).allowed == ()


def test_dropout_needs_something_to_drop(ready):
    with pytest.raises(ConfigError, match="dropout and target_modules"):
        ready(dropout=0.1, target_modules="", modules_to_save="lm_head")
    assert ready(target_modules="", modules_to_save="lm_head").coverage.full == ("lm_head",)


def test_attention_is_as_asked(ready):
    assert ready(engine="padded").way == Way("padded", "--engine padded")
    assert ready(engine="packed").way == Way("packed", "--engine packed")
    assert ready().way == Way("engine")


@pytest.mark.parametrize(("arch", "text"), [("bert", "kind encoder"), ("llama", "no tokenizer files")])
def test_a_base_must_read_text(arch, text):
    with pytest.raises(BaseError, match=text):
        tokenizer_of(wrap_base(tiny(arch)))


def test_preview_sees_the_same_rows(base, tmp_path):
    config = build(TrainConfig, {"data": write_rows(tmp_path / "rows.jsonl", CHATS), "holdout": 3, "seed": 9})
    assert read_data(base, config.data, config.seed).digest == prepare(base, config).data.digest
