"""`onebase extract`: the adapter that makes a tuned model of its base, and how well it holds the difference."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from onebase.adapters.adapter import Adapter
from onebase.adapters.targets import split_path
from onebase.cli.configs import ExtractConfig
from onebase.cli.console import console, table
from onebase.cli.using import read_prompts, require_given
from onebase.config import LoraConfig, build
from onebase.errors import OutputError, OutputExists
from onebase.files import require_writable
from onebase.models.base import family_of, locate_base
from onebase.models.merging import TunedCheck, check_tuned, open_skeleton
from onebase.storage.adapter_files import CONFIG
from onebase.storage.format import save_adapter
from onebase.training.report import count
from onebase.transforms.extraction import Extraction, Fit, extract_difference
from onebase.transforms.merge import Skeleton

WORST = 5
LORA = ("rank", "target_modules", "exclude_modules", "target_parameters", "lora_bias", "modules_to_save")


def run(options: dict[str, Any]) -> int:
    """Write the adapter, then say how far each update, and all of them together, are from the tuned model."""
    config = build(ExtractConfig, options)
    hint = "onebase extract --base smollm2-135m --tuned my-model --rank 16 --output runs/extracted"
    require_given(config, ("base", "tuned", "output"), hint)
    lora = build(LoraConfig, {name: getattr(config, name) for name in LORA} | {"alpha": config.rank})
    prompts = read_prompts(config.prompts)
    if Path(config.output).exists():
        raise OutputExists(f"extract to {config.output}", "it exists already", hint="choose another folder")
    require_writable(Path(config.output) / CONFIG)
    folders = [locate_base(one) for one in (config.base, config.tuned)]
    if inside := [one for one in folders if Path(config.output).resolve().is_relative_to(one.resolve())]:
        found = f"it lies in the model {inside[0]}"
        raise OutputError(f"extract to {config.output}", found, hint="choose a folder elsewhere")
    base, tuned = map(open_skeleton, folders)
    found = extract_difference(base, tuned, lora, config.allow)
    adapter = _named(found.adapter, base, config)
    save_adapter(adapter, config.output)
    _print(found, config)
    if config.check:
        check = check_tuned(base.folder, adapter, tuned.folder, prompts)
        console.print(table("logits against the tuned model's", _compared(check)))
    return 0


def _named(adapter: Adapter, base: Skeleton, config: ExtractConfig) -> Adapter:
    """The adapter with the names that the user gave to the two models, and PEFT's name for its task."""
    facts = dict(adapter.origin.training["extracted"]) | {"tuned": config.tuned, "allow": list(config.allow)}
    family = family_of(type(base.model).__name__)
    task = "CAUSAL_LM" if family and family[0] == "causal" else ""
    origin = replace(adapter.origin, base=config.base, task=task, training={"extracted": facts})
    return replace(adapter, origin=origin)


def _print(found: Extraction, config: ExtractConfig) -> None:
    adapter = found.adapter
    rows = [
        ("difference of", f"{config.tuned}\nand {config.base}"),
        ("size", f"{count(adapter.parameters)} parameters in {len(adapter.lowrank)} updates"),
        ("taken whole", ", ".join(adapter.full) or "nothing"),
        ("left out, as allowed", "\n".join(found.left) or "nothing"),
    ]
    console.print(table(f"adapter {config.output}", rows))
    if found.fits:
        console.print(_updates(found.fits))
        worst = sorted(found.fits, key=lambda path: -found.fits[path].error)[:WORST]
        shown = [(path, f"{found.fits[path].error:.3g}") for path in worst]
        console.print(table("farthest from W' - W, relative (Frobenius)", shown))


def _updates(fits: Mapping[str, Fit]) -> Table:
    """A row for each target: the norm of W' - W over its layers, and how much of it the updates miss."""
    made = Table("target", "modules", "norm of W' - W", "error", title="updates", title_justify="left")
    groups: dict[str, list[Fit]] = defaultdict(list)
    for path, fit in fits.items():
        stack, layer, rest = split_path(path)
        groups[path if layer is None else f"{stack}.*.{rest}"].append(fit)
    for target, own in groups.items():
        norm = math.hypot(*(fit.norm for fit in own))
        missed = math.hypot(*(fit.error * fit.norm for fit in own))
        made.add_row(Text(target), str(len(own)), f"{norm:.4g}", f"{missed / norm if norm else 0:.2g}")
    return made


def _compared(check: TunedCheck) -> list[tuple[str, str]]:
    near, plain = check
    return [
        (
            "largest difference, base and adapter",
            f"{near.difference:.3g} (the largest value is {near.largest:.3g})",
        ),
        ("of the plain base", f"{plain.difference:.3g}"),
        (
            "same likeliest token",
            f"{near.same_choice:.1%} of {near.tokens} tokens; {plain.same_choice:.1%} without",
        ),
    ]
