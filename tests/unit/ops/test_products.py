"""Products by either library are those of float64, in every layout that the engine gives them."""

import pytest
import torch

from onebase.ops import products
from onebase.ops.products import added_product, product
from pairs import draw

SHAPES = [(1, 1, 1), (3, 5, 7), (37, 33, 8), (130, 96, 61), (8, 1000, 24)]


@pytest.fixture(params=["as it comes", "without oneDNN"], autouse=True)
def library(request, monkeypatch):
    if request.param == "without oneDNN":
        monkeypatch.setattr(products, "_has_onednn", lambda: False)


def operands(shape, dtype, turned):
    """x, a weight, a bias and something to add to; `turned`: x and weight are views of their transposes."""
    rows, inner, outs = shape
    x, weight = draw(rows, inner, dtype=dtype).detach(), draw(outs, inner, seed=1, dtype=dtype).detach()
    if turned:
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    return (
        x,
        weight,
        draw(outs, seed=2, dtype=dtype).detach(),
        draw(rows, outs, seed=3, dtype=dtype).detach(),
    )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_the_definition(shape, dtype, turned):
    x, weight, bias, y = operands(shape, dtype, turned)
    exact = x.double() @ weight.double().T
    eps = torch.finfo(dtype).eps
    size = (x.double().abs() @ weight.double().T.abs()) + bias.double().abs() + y.double().abs()
    for found, expected in (
        (product(x, weight), exact),
        (product(x, weight, bias), exact + bias.double()),
        (added_product(y.clone(), x, weight), exact + y.double()),
    ):
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert bool(((found.double() - expected).abs() <= 4 * eps * size).all())


def test_columns_and_rows_of_larger_tensors():
    """Operands that begin inside others, as the parts of a joint batch and of a fused layer do."""
    wide = draw(20, 30, dtype=torch.float32).detach()
    weight = draw(9, 12, seed=1, dtype=torch.float32).detach()
    for x in (wide[4:11, :12], wide[:, 5:17], wide[4:11, 18:]):
        torch.testing.assert_close(product(x, weight), x @ weight.T)
        torch.testing.assert_close(product(x.T, wide[: len(x), :7].T), x.T @ wide[: len(x), :7])


def test_no_rows():
    x, weight = torch.zeros(0, 5), torch.ones(3, 5)
    assert product(x, weight).shape == (0, 3)
    assert added_product(torch.zeros(0, 3), x, weight).shape == (0, 3)


def test_the_same_product_has_the_same_bits():
    x, weight, _, _ = operands((130, 96, 61), torch.float32, False)
    assert torch.equal(product(x, weight), product(x, weight))
