"""`onebase merge`: base and adapter to one plain model, and how far its answers are from theirs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from onebase.cli.configs import MergeConfig
from onebase.cli.console import console, table
from onebase.cli.using import base_name, read_prompts, require_given
from onebase.config import build
from onebase.errors import OnebaseError
from onebase.models.base import locate_base
from onebase.models.merging import MergeCheck, check_merge, open_pair, plan_for
from onebase.training.report import size
from onebase.transforms.merge import MergePlan
from onebase.transforms.merge_files import OutputOptions, merge_files


def run(options: dict[str, Any]) -> int:
    """Merge file to file, then print what was written and the comparison with base and adapter."""
    config = build(MergeConfig, options)
    require_given(config, ("adapter", "output"), "give --{name} FOLDER")
    prompts = read_prompts(config.prompts)
    folder = locate_base(base_name(config.base, config.adapter))
    base, adapter = open_pair(folder, config.adapter, config.allow_base_mismatch)
    plan = plan_for(base, adapter)
    output = merge_files(plan, config.output, _how(config))
    console.print(table(f"merged into {output}", _written(plan, output)))
    if config.check:
        check = check_merge(base.folder, adapter, output, prompts)
        console.print(table("merged model against base and adapter", _compared(check)))
        if not math.isfinite(check.difference):
            found = "its answers, or those of base and adapter, are not finite numbers"
            hint = f"onebase doctor {config.adapter}, and --dtype float32 if the output is float16"
            raise OnebaseError(f"the merged model {output} is of no use", found, hint=hint)
    return 0


def _how(config: MergeConfig) -> OutputOptions:
    dtype = None if config.dtype == "stored" else getattr(torch, config.dtype)
    return OutputOptions(dtype, round(config.shard_size * 1e9))


def _written(plan: MergePlan, output: Path) -> list[tuple[str, str]]:
    files = sorted(output.glob("*.safetensors"))
    rows = [
        ("base", str(plan.folder)),
        ("tensors changed", f"{plan.changed} of {len(plan.parts)}"),
        ("weights", f"{size(sum(f.stat().st_size for f in files))} in {len(files)} file(s)"),
    ]
    if "vocab_size" in plan.settings:
        rows.append(("token rows", f"in place; the vocabulary has {plan.settings['vocab_size']} rows"))
    if plan.untied:
        rows.append(("no longer tied", f"{', '.join(plan.untied)}: the adapter does not change all alike"))
    return rows


def _compared(check: MergeCheck) -> list[tuple[str, str]]:
    return [
        ("largest difference", f"{check.difference:.3g} (the largest value is {check.largest:.3g})"),
        ("of it, rounding to the output's dtype", f"{check.rounding:.3g}"),
        ("same likeliest token", f"{check.same_choice:.1%} of {check.tokens} tokens"),
    ]
