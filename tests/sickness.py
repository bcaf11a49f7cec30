"""What the doctor's tests share: an adapter that is healthy on the tiny text base, and ways to spoil its folder."""

import json
from dataclasses import replace

from safetensors.torch import load_file, save_file

from adapters import trained
from onebase.adapters.adapter import Origin
from onebase.config import LoraConfig
from onebase.diagnosis.case import Case
from onebase.diagnosis.checkup import CHECKS, diagnose
from onebase.diagnosis.salvage import salvage
from onebase.storage.format import CONFIG, TENSORS
from texts import text_base, text_model


def adapter(model=None, config=None, size=0.3, **origin):
    """As training would leave it: an update of about a quarter of the weight."""
    made = trained(model or text_model(), config or LoraConfig(rank=4, alpha=8))
    low = {path: one._replace(A=one.A * size, B=one.B * size) for path, one in made.lowrank.items()}
    known = {"base": "tiny", "fingerprint": text_base().fingerprint, "prompt": {"chat": True}}
    return replace(made, lowrank=low, origin=Origin(**known | origin))


def look(folder, base="tiny", **more):
    """The findings of each check by its name, as (severity, text and advice, facts)."""
    base = text_base() if base == "tiny" else base
    case = Case(salvage(folder, base), base, **more)
    found = {name: [] for name in CHECKS}
    for name, finding in diagnose(case):
        found[name].append((finding.severity, f"{finding.found} | {finding.advice}", finding.facts))
    return found


def only(found, check, severity):
    """The one finding of a check, which must be of this severity: its text and facts."""
    ((got, text, facts),) = found[check]
    assert got == severity, text
    return text, facts


def grave(found):
    """The checks that found an error or a warning."""
    return {name for name, rows in found.items() for severity, *_ in rows if severity in ("error", "warning")}


def edit_config(folder, **values):
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | values))


def edit_tensors(folder, change):
    """Rewrite the file with `change(name, tensor)` -> (name, tensor), or None to leave one out."""
    pairs = [change(n, t) for n, t in load_file(folder / TENSORS).items()]
    data = (folder / TENSORS).read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
    save_file({n: t.contiguous() for n, t in filter(None, pairs)}, folder / TENSORS, metadata)
