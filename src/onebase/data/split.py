"""Which rows are held out for validation: seeded, pure, and a group of rows is never torn apart."""

from __future__ import annotations

import random
from collections.abc import Sequence

from onebase.data.read import Example
from onebase.errors import ConfigError, DataError


def split_examples(
    examples: Sequence[Example], holdout: float, by_group: bool, seed: int
) -> tuple[list[Example], list[Example]]:
    """(train, validation), each in the order of `examples`.

    `holdout` is a fraction below 1 (rounded, at least one), or a count; of groups if `by_group`, else of
    rows; 0 holds nothing out. Rows of one group are never on both sides, so that a prompt with many
    references cannot be learned and tested. Raises DataError if no row would be left to train on.
    """
    if holdout == 0:
        return list(examples), []
    if holdout > 1 and holdout != int(holdout):
        raise ConfigError(f"option holdout={holdout}", "must be a fraction below 1 or a whole number")
    keys = [example.group if by_group else str(index) for index, example in enumerate(examples)]
    units = list(dict.fromkeys(keys))
    count = max(1, round(len(units) * holdout)) if holdout < 1 else int(holdout)
    if count >= len(units):
        name = "groups" if by_group else "rows"
        hint = "lower --holdout, or train on every row with --holdout 0"
        raise DataError(f"holdout {holdout:g}", f"leaves none of {len(units)} {name} to train on", hint=hint)
    held = set(random.Random(seed).sample(units, count))
    train = [example for key, example in zip(keys, examples, strict=True) if key not in held]
    return train, [example for key, example in zip(keys, examples, strict=True) if key in held]
