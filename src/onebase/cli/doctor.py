"""`onebase doctor`: why an adapter has no effect, or a bad one. Works on folders that nothing else would load."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from onebase.adapters.adapter import Adapter
from onebase.adapters.fitting import fit_problems, with_kinds
from onebase.cli.configs import DoctorConfig
from onebase.cli.console import console, say
from onebase.cli.pictures import bar, heat_map
from onebase.cli.using import read_prompts
from onebase.config import build
from onebase.diagnosis.case import Case, Finding
from onebase.diagnosis.checkup import diagnose, verdict
from onebase.diagnosis.salvage import Salvage, salvage
from onebase.errors import ConfigError, OnebaseError
from onebase.models.base import Base, load_base
from onebase.models.probing import effect_of
from onebase.training.record import json_ready

NO_BASE = "off"
MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "fine": ("✓", "green"), "skipped": ("–", "dim")}
BAR = 12


def run(options: dict[str, Any]) -> int:
    """Print the findings and the verdict; returns 1 where one of the findings is an error, else 0."""
    config = build(DoctorConfig, options)
    if not config.adapter:
        raise ConfigError("option adapter", "is empty", hint="name a folder: onebase doctor runs/first")
    prompts = read_prompts(config.prompts)
    alone = salvage(config.adapter)
    opened = open_base(config.base, Case(alone).origin.base, config.dtype)
    case = _case(alone, opened, prompts)
    findings = diagnose(case)
    if config.json:
        print(json.dumps(json_ready(describe(case, findings)), indent=2))
    else:
        _print(case, findings)
    return int(any(finding.severity == "error" for _, finding in findings))


class Opened(NamedTuple):
    """A base, or why there is none."""

    base: Base | None
    why_not: str = ""


def open_base(asked: str, recorded: str, dtype: str) -> Opened:
    """The base that was asked for, else the recorded one if it can be had. Raises BaseError for one asked for."""
    if asked == NO_BASE or not (asked or recorded):
        return Opened(None, "no base: give --base" if not asked else "left out: --base off")
    try:
        return Opened(load_base(asked or recorded, dtype))
    except OnebaseError as error:
        if asked:
            raise
        return Opened(None, f"the recorded base cannot be opened ({error.asked}: {error.found}): give --base")


def _case(alone: Salvage, opened: Opened, prompts: tuple[str, ...]) -> Case:
    base = opened.base
    if base is None:
        return Case(alone, untried=opened.why_not)
    try:
        base = base.for_adapter(alone.stored.adapter if alone.stored else None)
    except OnebaseError as error:
        return Case(alone, base, untried=str(error))
    files = salvage(alone.folder, base)
    if files.stored is None:
        return Case(files, base, untried="the adapter cannot be loaded")
    adapter: Adapter = with_kinds(base.model, files.stored.adapter)
    if fit_problems(base.model, adapter):
        return Case(files, base, untried="the adapter does not fit this base")
    try:
        return Case(files, base, effect_of(base, adapter, prompts))
    except OnebaseError as error:  # no text model, or no way to render the prompts: its own check says so too
        return Case(files, base, untried=str(error))


def describe(case: Case, findings: list[tuple[str, Finding]]) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "adapter": str(case.files.folder),
        "base": case.base.name if case.base is not None else None,
        "verdict": verdict(findings),
        "healthy": all(finding.severity != "error" for _, finding in findings),
        "findings": [{"check": name, **finding._asdict()} for name, finding in findings],
        "modules": [
            {
                **{key: value for key, value in module._asdict().items() if key != "spectrum"},
                "stable rank": module.spectrum.stable_rank if module.spectrum else None,
                "top direction": module.spectrum.top_share if module.spectrum else None,
            }
            for module in case.modules
        ],
        "effect": case.effect._asdict() if case.effect else None,
    }


def _print(case: Case, findings: list[tuple[str, Finding]]) -> None:
    plain = plain_screen()
    table = Table(title=f"adapter {case.files.folder}", title_justify="left", show_header=False)
    for name, finding in _told(findings):
        mark, style = MARKS[finding.severity]
        shown = Text(finding.found, overflow="fold")
        if finding.advice:
            shown.append(f"\n{'->' if plain else '→'} {finding.advice}", "italic")
        table.add_row(Text(finding.severity if plain else mark, style), name, shown)
    console.print(table)
    _print_sizes(case, plain)
    say(f"verdict: {verdict(findings)}")


def _told(findings: list[tuple[str, Finding]]) -> list[tuple[str, Finding]]:
    """The findings, those that were skipped for one and the same reason in one row."""
    reasons: dict[str, list[str]] = {}
    for name, finding in findings:
        if finding.severity == "skipped":
            reasons.setdefault(finding.found, []).append(name)
    rows = [(name, finding) for name, finding in findings if finding.severity != "skipped"]
    untold = [Finding("skipped", f"{', '.join(names)}: {reason}") for reason, names in reasons.items()]
    return rows + [("not looked at", finding) for finding in untold]


def plain_screen() -> bool:
    """Whether the screen can show ASCII alone."""
    return not (console.encoding or "").lower().startswith("utf")


def _print_sizes(case: Case, plain: bool) -> None:
    """The update's size, layer by layer: beside the weight with a base, by itself without."""
    ratios = {m.path: m.ratio for m in case.modules}
    known = any(ratio is not None for ratio in ratios.values())
    values = ratios if known else {m.path: m.norm for m in case.modules}
    if not any(value is not None for value in values.values()):
        return
    picture = heat_map(values, max(16, console.width - 64), plain)
    what = "|W' - W| / |W|" if known else "|s·B·A|"
    form = "{:.2%}" if known else "{:.3g}"
    width = f"; {picture.layers} layers a column" if picture.layers > 1 else ""
    title = f"{what} by layer (fullest cell: {form.format(picture.top)}{width})"
    table = Table("target", "layers", "mean", "", title=title, title_justify="left")
    largest = max(row.mean for row in picture.rows)
    for row in picture.rows:
        table.add_row(
            Text(row.name), Text(row.cells), form.format(row.mean), bar(row.mean, largest, BAR, plain)
        )
    console.print(table)
