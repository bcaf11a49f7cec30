"""Each gate fires on what it is for and on nothing else; all are reported at once."""

from __future__ import annotations

import pytest
import torch

from onebase.config import GATES
from onebase.data.checks import FIXES, Finding, added_untrained_ids, check, describe, enforce
from onebase.data.template import Encoded, EncodedSet
from onebase.errors import GateError

GOOD = Encoded(1, [10, 11, 2], [False, True, True])  # 2 is </s> in the fixtures


def gates(tokenizer, *rows, unmarked=(), untrained=()) -> dict[str, tuple[int, ...]]:
    found = check(EncodedSet(list(rows), unmarked=unmarked), tokenizer, [2], untrained)
    return {finding.gate: finding.rows for finding in found}


def test_good_rows_pass(gpt):
    assert gpt.eos_token_id == 2
    assert gates(gpt, GOOD) == {}
    assert gates(gpt, GOOD, Encoded(2, [10, 12], [False, True], truncated=True)) == {}


def test_each_gate_fires_on_its_rows(gpt):
    assert gates(gpt, GOOD, Encoded(4, [10, 2], [False, False])) == {"no-loss": (4,)}
    unended = [Encoded(row, [10, 2, 11], [False, False, True]) for row in (3, 4)]
    assert gates(gpt, *unended) == {"no-eos": (3, 4)}
    assert gates(gpt, GOOD, Encoded(5, [1, 1, 2], [False, False, True])) == {"double-bos": (5,)}
    assert gates(gpt, GOOD, unmarked=(6,)) == {"unmarked-turns": (6,)}
    row = Encoded(7, [3, 11, 4], [False, True, True])
    assert gates(gpt, GOOD, row, untrained={4, 9}) == {"untrained-special": (7,)}
    assert gates(gpt, GOOD, row, untrained={3}) == {}, "an input is not a target"
    named = check(EncodedSet([GOOD, row]), gpt, [2], {4})
    assert "<|im_end|>" in named[0].message
    assert "<|im_start|>" not in named[0].message


def test_every_fix_belongs_to_a_gate():
    assert FIXES.keys() <= GATES.keys()


def test_enforce_lists_all_gates_with_rows_and_fixes():
    findings = [Finding("no-loss", tuple(range(1, 9)), "nothing"), Finding("no-eos", (3,), "no end")]
    with pytest.raises(GateError) as caught:
        enforce(findings, [])
    message = str(caught.value)
    assert "2 gates failed" in message
    assert "nothing (8 rows: 1, 2, 3, 4, 5, ...)" in message
    assert "no end (1 row: 3)" in message
    for gate in ("no-loss", "no-eos"):
        assert FIXES[gate] in message
    assert "--allow no-loss,no-eos" in message
    with pytest.raises(GateError) as caught:
        enforce(findings, {"no-loss"})
    assert "nothing" not in str(caught.value)
    assert enforce(findings, {"no-loss", "no-eos", "double-bos"}) == findings
    assert enforce([], []) == []


def test_a_finding_without_rows_or_fix_is_described_all_the_same():
    assert (
        describe(Finding("uneven-targets", (), "q_proj is missing in layer 3"))
        == "q_proj is missing in layer 3"
    )


def test_untrained_embeddings_are_found(gpt):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(gpt), 16, generator=generator)
    unk, bos, eos, start, end = range(5)
    assert added_untrained_ids(gpt, weight) == frozenset()
    weight[start] = 0
    assert added_untrained_ids(gpt, weight) == {start}
    weight[bos] = weight[eos]
    assert added_untrained_ids(gpt, weight) == {start, bos, eos}
    weight[bos] = torch.randn(16, generator=generator)
    others = torch.arange(len(weight)) != unk
    weight[unk] = weight[others].mean(0) + 1e-4
    assert added_untrained_ids(gpt, weight.bfloat16()) == {unk, start}
    assert added_untrained_ids(gpt, weight[:4]) >= {end}, "no row at all"
    weight[200] = weight[201]
    assert added_untrained_ids(gpt, weight) == {unk, start}, "ordinary tokens are not judged"
