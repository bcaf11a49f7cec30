"""Predictions and their marks: known answers for accuracy, macro F1, correlation, R² and the constant answer."""

import math

import pytest
import torch

from onebase.data.labels import Head
from onebase.data.template import Encoded
from onebase.prediction import Marks, baseline, marks, predictions

CLASSES = Head("classify", ("a", "b", "c"), (1, 6, 3))


def rows(*labels):
    return [Encoded(n, [1], [False], label=float(label)) for n, label in enumerate(labels)]


def logits(*chosen):
    return torch.eye(3)[list(chosen)] * 4


def test_predictions_name_the_likeliest_class():
    first, second = predictions(CLASSES, torch.tensor([[0.0, 0.0, math.log(2)], [1.0, 1.0, 0.0]]))
    assert first.label == "c"
    assert first.probabilities == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5})
    assert second.label == "a"  # the first of equals
    assert predictions(Head("regress"), torch.tensor([[2.5]])) == [(2.5, {})]


def test_accuracy_and_macro_f1_against_sums_by_hand():
    found = marks(CLASSES, logits(0, 0, 1, 1), rows(0, 1, 1, 1))
    # a: precision 1/2, recall 1 -> 2/3; b: precision 1, recall 2/3 -> 4/5; c occurs nowhere
    assert found.accuracy == 0.75
    assert found.macro_f1 == pytest.approx((2 / 3 + 4 / 5) / 2)
    right, wrong = -math.log(math.exp(4) / (math.exp(4) + 2)), -math.log(1 / (math.exp(4) + 2))
    assert found.loss == pytest.approx((3 * right + wrong) / 4)
    assert (found.pearson, found.r2) == (None, None)
    assert marks(CLASSES, logits(2, 2), rows(0, 1)).macro_f1 == 0


def test_numbers_against_sums_by_hand():
    found = marks(Head("regress"), torch.tensor([[1.0], [2.0], [4.0]]), rows(1, 3, 5))
    assert found.loss == pytest.approx(2 / 3)
    assert found.r2 == pytest.approx(1 - (2 / 3) / (8 / 3))
    assert found.pearson == pytest.approx(6 / math.sqrt((14 / 3) * 8))
    assert marks(Head("regress"), torch.tensor([[1.0], [2.0]]), rows(3, 3))[3:] == (None, None)


def test_the_constant_answer():
    found = baseline(CLASSES, rows(1, 1, 2, 0))
    assert found.accuracy == 0.5
    assert found.macro_f1 == pytest.approx((2 * 2 / (4 + 2)) / 3)
    assert found.loss == pytest.approx(-(2 * math.log(0.6) + math.log(0.3) + math.log(0.1)) / 4)
    assert baseline(Head("regress", mean=2.0), rows(1, 3)) == Marks(1.0, r2=0.0)
