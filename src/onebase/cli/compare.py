"""`onebase compare`: how two adapters differ, module by module and in what they do to prompts."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table
from rich.text import Text

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import base_modules
from onebase.adapters.kinds import find_site
from onebase.cli.configs import CompareConfig
from onebase.cli.console import console, table
from onebase.cli.doctor import Opened, open_base, plain_screen
from onebase.cli.pictures import heat_map
from onebase.cli.using import read_prompts
from onebase.config import Sampling, build
from onebase.diagnosis.comparison import Pair, compare, summary
from onebase.errors import ConfigError
from onebase.models.base import Base
from onebase.models.generation import format_of
from onebase.models.probing import answers_of, divergences, prompt_ids
from onebase.storage.format import load_adapter, read_adapter
from onebase.training.record import json_ready

NAMES: tuple[str, str] = ("first", "second")


def run(options: dict[str, Any]) -> int:
    """Print the comparison: without a base the updates alone, with one also what each does to prompts."""
    config = build(CompareConfig, options)
    if len(config.adapters) != 2:
        hint = "onebase compare runs/a runs/b"
        raise ConfigError("compare", f"{len(config.adapters)} adapter folders, it takes two", hint=hint)
    adapters: dict[str, Adapter] = dict(zip(NAMES, map(read_adapter, config.adapters), strict=True))
    prompts = read_prompts(config.prompts)
    recorded = next((a.origin.base for a in adapters.values() if a.origin.base), "")
    opened = open_base(config.base, recorded, config.dtype)
    if opened.base is not None:
        folders = zip(NAMES, config.adapters, strict=True)
        adapters = {n: load_adapter(f, opened.base, config.allow_base_mismatch) for n, f in folders}
    pairs = compare(adapters["first"], adapters["second"], _weights(opened.base))
    probed = _probed(config, opened, adapters, prompts)
    full = {name: [*adapter.full, *adapter.tokens] for name, adapter in adapters.items()}
    facts = describe(config, pairs, probed) | {"trained in full": full}
    if config.json:
        print(json.dumps(json_ready(facts), indent=2))
    else:
        _print(facts, pairs)
    return 0


def _weights(base: Base | None) -> Any:
    """Module path -> the base's weight; None without a base."""
    if base is None:
        return None
    modules = dict(base_modules(base.model))

    def weight(path: str) -> Any:
        site = find_site(modules, path)
        assert site is not None  # load_adapter has proven that the adapters fit
        return modules[site.owner].get_parameter(site.name).detach()

    return weight


def _probed(
    config: CompareConfig, opened: Opened, adapters: dict[str, Adapter], prompts: tuple[str, ...]
) -> dict[str, Any]:
    """The divergences and the answers, or why there are none."""
    base = opened.base
    if base is None or base.kind != "causal":
        return {"skipped": opened.why_not or "the base is no text model that answers"}
    rows = {name: prompt_ids(base, prompts, format_of(base, adapter)) for name, adapter in adapters.items()}
    effects = divergences(base, adapters, rows)
    told = [{"of": p, "from": q, **effect._asdict()} for (p, q), effect in effects.items()]
    if base.tokenizer is None or not config.answers:
        return {"divergences": told}
    chosen = list(prompts[: config.answers])
    given = answers_of(base, adapters, chosen, Sampling(max_new_tokens=config.max_new_tokens))
    answers = [
        {"prompt": prompt, **{name: own[row] for name, own in given.items()}}
        for row, prompt in enumerate(chosen)
    ]
    return {"divergences": told, "answers": answers}


def describe(config: CompareConfig, pairs: list[Pair], probed: dict[str, Any]) -> dict[str, Any]:
    """All of it as plain values."""
    whole = summary(pairs)
    modules = [
        {**pair._asdict(), "overlap": pair.overlap._asdict() if pair.overlap else None} for pair in pairs
    ]
    folders = dict(zip(NAMES, config.adapters, strict=True))
    return {"adapters": folders, "summary": whole._asdict(), "modules": modules, "prompts": probed}


def _print(facts: dict[str, Any], pairs: list[Pair]) -> None:
    whole, probed = facts["summary"], facts["prompts"]
    rows = [(name, folder) for name, folder in facts["adapters"].items()]
    alone = " and ".join(
        f"{n} only in the {name}" for n, name in zip(whole["alone"], NAMES, strict=True) if n
    )
    rows += [
        ("modules", f"{whole['shared']} in both{', ' + alone if alone else ''}"),
        ("norms of the updates", "{:.4g} and {:.4g}".format(*whole["norms"])),
        ("cosine of the updates", _number(whole["cosine"])),
    ]
    full = [f"{', '.join(paths)} ({name})" for name, paths in facts["trained in full"].items() if paths]
    rows += [("not compared: trained in full", "; ".join(full))] if full else []
    console.print(table("two adapters", rows))
    console.print(_modules(pairs))
    if "skipped" in probed:
        console.print(Text(f"what they do to prompts was not looked at: {probed['skipped']}", "dim"))
        return
    effects = Table("KL", "mean, nats a token", "largest", "another likeliest token", title="on prompts")
    for one in probed["divergences"]:
        name = f"{one['of']} || {one['from']}"
        effects.add_row(name, f"{one['mean']:.3g}", f"{one['largest']:.3g}", f"{one['changed']:.1%}")
    console.print(effects)
    for answer in probed.get("answers", []):
        shown = [(name, text.strip()) for name, text in answer.items() if name != "prompt"]
        console.print(table(answer["prompt"], shown))


def _modules(pairs: list[Pair]) -> Table:
    """A row for each target: the cosine by layer as a picture, and the means of the numbers."""
    width, plain = max(16, console.width - 84), plain_screen()
    sizes = heat_map({p.path: abs(p.cosine) if p.cosine is not None else None for p in pairs}, width, plain)
    title = f"by target (a cell: |cosine| of a layer, fullest {sizes.top:.2f})"
    made = Table(
        "target", "cosine", "mean", "shared inputs", "shared outputs", title=title, title_justify="left"
    )
    cosines = {row.name: row.mean for row in heat_map({p.path: p.cosine for p in pairs}, width, plain).rows}
    columns = ("inputs", "outputs", "chance_inputs", "chance_outputs")
    shares = {
        column: {p.path: getattr(p.overlap, column) if p.overlap else None for p in pairs}
        for column in columns
    }
    means = {c: {row.name: row.mean for row in heat_map(v, width, plain).rows} for c, v in shares.items()}
    for row in sizes.rows:
        shown = [
            f"{means[c][row.name]:.1%} (chance {means[f'chance_{c}'][row.name]:.1%})"
            if row.name in means[c]
            else "-"
            for c in columns[:2]
        ]
        made.add_row(Text(row.name, overflow="fold"), Text(row.cells), _number(cosines[row.name]), *shown)
    return made


def _number(value: float | None) -> str:
    return "cannot be told" if value is None else f"{value:.3f}"
