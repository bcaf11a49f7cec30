"""States below an adapter: what is read back is what would be computed, and only the layers above are run again."""

import pytest
import torch

from decoders import Wide, adapted, decoder, gradients
from onebase.adapters.injection import use
from onebase.data.template import Encoded
from onebase.data.trie import layout
from onebase.models import engine as engine_module
from onebase.models.below import Below
from onebase.models.engine import Engine

pytestmark = pytest.mark.slow

PROMPT = list(range(10, 20))
ROWS = [
    Encoded(0, [*PROMPT, 30, 31], [False] * 10 + [True] * 2),
    Encoded(1, [*PROMPT, 32], [False] * 10 + [True]),
    Encoded(2, [40, 41, 42], [False, True, True]),
    Encoded(3, [*PROMPT, 30, 31], [False] * 10 + [True] * 2),  # the first one again
]
STRANGER = Encoded(4, [50, 51], [False, True])


@pytest.fixture
def top():
    """A model of three layers with an adapter on the last alone."""
    model = decoder("llama")
    return model, adapted(model, torch.float64, layers="2")


@pytest.mark.parametrize("share", [False, True])
def test_states_that_are_read_back_give_the_same_loss_and_gradients(top, tmp_path, share):
    model, parameters = top
    with Wide(), use(model):
        engine = Engine(model, "default")
        assert engine.first == 2
        below = Below(engine, ROWS, tmp_path)
        for rows in (ROWS[:2], ROWS[2:], [ROWS[2], ROWS[1], ROWS[0]], ROWS):
            laid = layout(rows, share)
            states = below.states(rows, laid)
            assert states.shape[0] == len(laid.ids)
            plain, read = engine.loss(laid), engine.loss(laid, below=states)
            assert float(read.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
            one, other = gradients(plain, parameters), gradients(read, parameters)
            assert all(torch.allclose(one[key], other[key], rtol=1e-9, atol=1e-12) for key in one)


def test_only_the_layers_from_the_adapter_on_are_run(top, tmp_path, monkeypatch):
    model, _ = top
    with Wide(), use(model):
        engine = Engine(model, "default")
        below = Below(engine, ROWS, tmp_path)
        laid, run = layout(ROWS, True), []
        plain = engine_module.decoder_layer
        monkeypatch.setattr(engine_module, "decoder_layer", lambda *given: run.append(1) or plain(*given))
        engine.loss(laid, below=below.states(ROWS, laid))
        assert len(run) == 1
        engine.loss(laid)
        assert len(run) == 1 + 3


def test_rows_that_were_not_computed_have_no_states(top, tmp_path):
    model, _ = top
    with Wide(), use(model):
        below = Below(Engine(model, "default"), ROWS, tmp_path)
    rows = [ROWS[0], STRANGER]
    assert below.states(rows, layout(rows, True)) is None


def test_two_computations_have_the_same_bits_and_leave_no_file(top, tmp_path):
    model, _ = top
    with use(model):
        one, other = (Below(Engine(model, "default"), ROWS, tmp_path) for _ in range(2))
    laid = layout(ROWS, True)
    assert torch.equal(one.states(ROWS, laid), other.states(ROWS, laid))
    assert list(tmp_path.iterdir()) == []
