"""Gates: checks on the encoded rows that stop a run before its first step, all reported at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.data.template import Encoded, EncodedSet, Tokenizer
from onebase.errors import GateError

FIXES = {
    "no-loss": "remove these rows, give them a completion, or raise --max-length where the answer was cut off",
    "no-eos": "give --teach-eos, or end the answers with the base's end-of-text token",
    "double-bos": "remove the beginning-of-text token from the data or from the chat template: one is enough",
    "unmarked-turns": "put {% generation %} tags into the chat template, or use prompt and completion rows",
    "rare-class": "give the class more rows, or leave its rows out",
    "empty-text": "remove these rows, or give them a text",
    "same-text": "remove these rows, or give them another text",
    "untrained-special": "train their rows with --trainable-tokens, or use a template with trained tokens",
}


# Gates of rows that teach labels or pairs; the others are of rows that teach text.
KIND_OF = {"rare-class": "labels", "empty-text": "pairs", "same-text": "pairs"}


@dataclass(frozen=True)
class Finding:
    """A gate (a name in config.GATES) that failed, the numbers of the rows, and what is wrong with them."""

    gate: str
    rows: tuple[int, ...]
    message: str


def check(
    encoded: EncodedSet, tokenizer: Tokenizer, stop_ids: Collection[int], untrained_ids: Collection[int] = ()
) -> list[Finding]:
    """The gates that fail on these rows, in the order of config.GATES.

    `untrained_ids` are the ids that cannot be learned: added tokens with an untrained embedding (see
    `added_untrained_ids`) that this run keeps frozen; none if their embedding is trained.
    """
    untrained = set(untrained_ids)
    targets = [(row.row, _targets(row)) for row in encoded.rows]
    bos = tokenizer.bos_token_id
    taught = any(ids & set(stop_ids) for _, ids in targets)
    special = sorted(set().union(*(ids for _, ids in targets)) & untrained)
    names = ", ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in special)
    failed = {
        "no-loss": ([row for row, ids in targets if not ids], "no token carries loss"),
        "no-eos": (
            [] if taught else [row for row, _ in targets],
            "no end-of-text token ever carries loss, so the model would not learn to stop",
        ),
        "double-bos": (
            [row.row for row in encoded.rows if bos is not None and row.ids[:2] == [bos, bos]],
            "the row starts with two beginning-of-text tokens",
        ),
        "unmarked-turns": (
            list(encoded.unmarked),
            "the chat template does not let assistant turns be told from the rest; all tokens carry loss",
        ),
        "untrained-special": (
            [row for row, ids in targets if ids & untrained],
            f"the loss covers added tokens whose embedding is frozen and untrained: {names}",
        ),
    }
    return [Finding(gate, tuple(rows), message) for gate, (rows, message) in failed.items() if rows]


def _targets(row: Encoded) -> set[int]:
    return {token for token, carries in zip(row.ids, row.loss, strict=True) if carries}


def enforce(findings: Sequence[Finding], allowed: Collection[str]) -> list[Finding]:
    """The findings that `allowed` overrides; raises one GateError with all the others."""
    failed = [finding for finding in findings if finding.gate not in allowed]
    if not failed:
        return list(findings)
    lines = (f"\n  {finding.gate}: {describe(finding)}" for finding in failed)
    hint = "to go on all the same: --allow " + ",".join(finding.gate for finding in failed)
    title = "1 gate failed" if len(failed) == 1 else f"{len(failed)} gates failed"
    raise GateError(f"{title}:{''.join(lines)}", hint=hint)


def describe(finding: Finding, fix: bool = True) -> str:
    """What is wrong, in how many rows (the first five by number), and on a second line how to fix it."""
    text = finding.message
    if finding.rows:
        numbers = ", ".join(str(row) for row in finding.rows[:5])
        more = ", ..." if len(finding.rows) > 5 else ""
        text += f" ({len(finding.rows)} {'row' if len(finding.rows) == 1 else 'rows'}: {numbers}{more})"
    return f"{text}\n    fix: {FIXES[finding.gate]}" if fix and finding.gate in FIXES else text


def added_untrained_ids(tokenizer: Tokenizer, embedding: Tensor) -> frozenset[int]:
    """Ids of added special tokens whose row of `embedding` (vocabulary, width) was never trained.

    Such a row is missing, all zero, equal to another added token's, or the mean of all rows as a resize
    leaves it (transformers' `mean_resizing` adds a little noise, hence a hundredth of the usual distance).
    """
    added = sorted(token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special)
    missing = {token for token in added if token >= len(embedding)}
    known = [token for token in added if token not in missing]
    if not known:
        return frozenset(missing)
    weight = embedding.detach()
    mean = weight.mean(0, dtype=torch.float32)
    rows = weight[known].float()
    sample = weight[:: max(1, len(weight) // 4096)].float()
    usual = (sample - mean).norm(dim=1).median()
    same = (rows[:, None] == rows[None]).all(-1).sum(1) > 1
    dead = (rows == 0).all(1) | same | ((rows - mean).norm(dim=1) <= usual / 100)
    return frozenset(
        missing | {token for token, is_dead in zip(known, dead.tolist(), strict=True) if is_dead}
    )
