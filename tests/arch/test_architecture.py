"""The rules of docs/design.md, checked on the source itself: who imports whom, sizes, options, import time."""

import ast
import importlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import onebase
from onebase import config
from onebase.cli import configs

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "onebase"

# Every module, from the bottom up. A module imports only from modules before it.
ORDER = """
    errors  files  options  tasks  config  grid  device  native
    ops.lowrank  ops.products  ops.kernels  ops.norms  ops.gates  ops.rotary  ops.forest  ops.prefix  ops.adapted
    ops.cross_entropy  ops.decoder
    ops.reference  ops.attention  ops.grouped
    adapters.adapter  adapters.kinds  adapters.patterns  adapters.variants  adapters.layers  adapters.targets
    adapters.tokens  adapters.fitting  adapters.injection  adapters.calibration
    storage.peft_tokens  storage.peft_config  storage.peft_tensors  storage.peft_biases  storage.peft_experts
    storage.shards
    storage.adapter_files  storage.format
    storage.alike
    transforms.combining  transforms.arithmetic  transforms.merge  transforms.merge_files  transforms.extraction
    transforms.export
    data.read  data.split  data.template  data.modelfile  data.trie  data.pack  data.checks  data.labels  data.pairs
    data.preview
    diagnosis.names  diagnosis.salvage  diagnosis.measures  diagnosis.case  diagnosis.own  diagnosis.against
    diagnosis.checkup  diagnosis.comparison
    models.builtin  models.fingerprint  models.gguf  models.heads  models.embedder  models.base  models.vocabulary
    models.packing  models.loss  models.generation  models.stored  models.merging  models.gguf_adapter
    models.probing  models.families  models.reading  models.engine  models.below  models.scoring
    prediction  embedding  evaluation
    training.record  training.curves  training.report  training.card  training.loggers
    training.distributed  training.optim  training.step  training.checkpoint  training.loop
    training.work  training.speed  training.memory  training.warmstart  training.prepare  training.calibrate
    training.plan  training.forecast  training.finish  training.run  training.sweep
    serve.request  serve.scheduler  serve.pace  serve.text  serve.sampler  serve.pool  serve.cache  serve.weights
    serve.native  serve.runner
    serve.prompts  serve.fallback  serve.proof  serve.engine  serve.worker
    web.settings  web.problems  web.protocol  web.metrics  web.answering  web.shapes
    web.guard  web.service  web.http  web.server  web.ray_app
    demo  demo.make_data
    cli.configs  cli.console  cli.screen  cli.using  cli.train  cli.sweep  cli.preview  cli.predict  cli.embed
    cli.generate  cli.chat  cli.evaluate  cli.inspect  cli.demo  cli.merge  cli.combine  cli.extract  cli.export
    cli.pictures  cli.doctor  cli.compare  cli.bench  cli.serve  cli.parser  cli.main
    __main__
""".split()

# A package and one that it never imports.
STRANGERS = [
    tuple(pair.split()) for pair in ("training serve", "serve training", "training web", "web training")
]

# Foreign package -> where alone it may be imported; nowhere for an empty tuple.
HOMES = {
    "transformers": ("models.",),
    "safetensors": ("storage.adapter_files", "storage.format", "storage.shards"),
    "huggingface_hub": ("models.",),
    "datasets": ("data.read",),
    "gguf": ("models.gguf_adapter",),
    "fastapi": ("web.http",),
    "starlette": ("web.http", "web.guard", "web.ray_app"),
    "uvicorn": ("web.server",),
    "prometheus_client": ("web.metrics",),
    "peft": (),
    "trl": (),
    "pickle": (),
    "marshal": (),
    "shelve": (),
}

# Imports inside functions: (module, package) -> why it does not stand at the top.
LATE_IMPORTS = {
    ("data.read", "pyarrow"): "half a second to import, needed for Parquet files only",
    ("data.read", "datasets"): "seconds to import, needed for hub datasets only",
    ("training.curves", "matplotlib"): "most of a second to import, which every command would pay",
}
# Imports by a name that is data.
NAMED_IMPORTS = {
    "__init__": "public names load their module when first used",
    "cli.main": "a command loads its module when it runs",
    "cli.bench": "PEFT, if it is installed: to be compared with, never to be relied on",
    "cli.serve": "what answers HTTP is an extra; without it the command says how to install it",
    "web.ray_app": "Ray is an extra, and needed only to build the application",
    "training.loggers": "optional packages, chosen by name",
}

FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 6
WIDE_FUNCTIONS = {
    ("ops.attention", "segmented_attention"): "scaled_dot_product_attention's arguments and the segments",
    ("ops.reference", "attention_reference"): "the same arguments as the op that it specifies",
}

# What an expression that holds options is called in the source.
GROUPS = ("lora", "data", "optim", "using", "sampling", "recipe")
HOLDERS = {"config", "given", *GROUPS}


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name inside the package, its text and its tree."""

    name: str
    text: str
    tree: ast.Module

    def functions(self):
        return [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]

    def imports(self):
        """(imported dotted name, is it inside a function) of every import statement."""
        inside = {id(inner) for function in self.functions() for inner in ast.walk(function)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, id(node) in inside) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: a relative import hides the layer"
                yield from ((f"{node.module}.{alias.name}", id(node) in inside) for alias in node.names)

    def own_imports(self):
        """The modules of onebase that this one imports, by their names in ORDER."""
        for name, _ in self.imports():
            if name.partition(".")[0] == "onebase":
                inner = name.removeprefix("onebase.")
                yield inner if inner in MODULES else inner.rpartition(".")[0]


def dotted(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def modules() -> dict[str, Module]:
    files = sorted(SOURCE.rglob("*.py"))
    texts = {dotted(file): file.read_text(encoding="utf-8") for file in files}
    return {name: Module(name, text, ast.parse(text)) for name, text in texts.items()}


MODULES = modules()
PACKAGES = set("ops adapters storage transforms data diagnosis models training serve web cli".split())
FACADES = {"__init__", *PACKAGES} & MODULES.keys()


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(MODULES.keys() - FACADES)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_modules_before_it(name):
    before = set(ORDER[: ORDER.index(name)])
    assert set(MODULES[name].own_imports()) <= before


@pytest.mark.parametrize("name", sorted(FACADES - {"__init__"}))
def test_a_package_file_imports_nothing(name):
    assert list(MODULES[name].imports()) == []


def test_nobody_imports_the_command_line_nor_a_stranger():
    for name, module in MODULES.items():
        package = name.partition(".")[0]
        imported = {other.partition(".")[0] for other in module.own_imports()}
        assert package in ("cli", "__main__") or "cli" not in imported, name
        assert not any(package == one and other in imported for one, other in STRANGERS), name


@pytest.mark.parametrize("package", HOMES)
def test_foreign_packages_stay_at_home(package):
    users = {
        name
        for name, module in MODULES.items()
        for imported, _ in module.imports()
        if imported.partition(".")[0] == package
    }
    strays = {name for name in users if not name.startswith(HOMES[package])} if HOMES[package] else users
    assert strays == set()


def calls(module: Module) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(module.tree) if isinstance(node, ast.Call)}


def test_nothing_runs_code_from_files():
    forbidden = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "torch.load",
        "torch.save",
        "yaml.load",
        "os.system",
    }
    assert {
        name: calls(module) & forbidden for name, module in MODULES.items() if calls(module) & forbidden
    } == {}


def test_imports_inside_functions_are_the_listed_ones():
    found = {
        (name, imported.partition(".")[0])
        for name, module in MODULES.items()
        for imported, inside in module.imports()
        if inside
    }
    assert found == LATE_IMPORTS.keys()
    named = {name for name, module in MODULES.items() if "importlib.import_module" in calls(module)}
    assert named == NAMED_IMPORTS.keys()


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
ALLOWED_AT_TOP = (ast.Import, ast.ImportFrom, *FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign)


def is_plain(node: ast.stmt) -> bool:
    """A definition, an import, a text, or a guarded block that does not run on import."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
    return isinstance(node, ALLOWED_AT_TOP)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_only_defines(name):
    odd = [ast.unparse(node) for node in MODULES[name].tree.body if not is_plain(node)]
    assert odd == []
    assert not any(isinstance(node, ast.Global) for node in ast.walk(MODULES[name].tree))


def in_a_fresh_process(code: str):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["onebase", "onebase.config", "onebase.cli.main"])
def test_the_entrances_import_no_heavy_package(name):
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'}"
    code = f"import sys, json, {name}; print(json.dumps(sorted({heavy} & sys.modules.keys())))"
    assert in_a_fresh_process(code) == []


def test_importing_everything_changes_nothing_around_it():
    """Foreign packages come first: what they do to the process is theirs."""
    foreign = sorted(
        {i for m in MODULES.values() for i, inside in m.imports() if not inside and "onebase" not in i}
    )
    code = f"""
import contextlib, importlib, json, logging, os, signal, sys, threading
for name in {foreign}:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module(name.rpartition(".")[0] or name)
import torch
def around():
    loggers = [logging.root, logging.getLogger("onebase")]
    return [dict(os.environ), [(len(log.handlers), log.level) for log in loggers], torch.get_num_threads(),
        str(torch.get_default_dtype()), torch.initial_seed(), threading.active_count(), str(sys.excepthook),
        str(signal.getsignal(signal.SIGINT)), str(signal.getsignal(signal.SIGTERM)), torch.cuda.is_initialized()]
before = around()
for name in {["onebase", *(f"onebase.{name}" for name in ORDER)]}:
    importlib.import_module(name)
print(json.dumps(before == around()))
"""
    assert in_a_fresh_process(code) is True


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short(name):
    module = MODULES[name]
    assert len(module.text.splitlines()) <= FILE_LINES
    lines = {f.name: f.end_lineno - f.lineno + 1 for f in module.functions()}
    assert {function: n for function, n in lines.items() if n > FUNCTION_LINES} == {}


def parameters(function) -> int:
    a = function.args
    given = [one.arg for one in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if one]
    return len([one for one in given if one not in ("self", "cls")])


def test_functions_take_few_parameters():
    wide = {
        (name, f.name) for name, m in MODULES.items() for f in m.functions() if parameters(f) > PARAMETERS
    }
    assert wide == WIDE_FUNCTIONS.keys()


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/**/*.py")), ids=lambda path: path.name)
def test_test_files_are_short_and_say_what_they_are_for(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert len(text.splitlines()) <= FILE_LINES


@pytest.mark.parametrize("name", MODULES)
def test_a_source_file_says_what_it_is_for(name):
    assert MODULES[name].text.startswith('"""')


def option_fields() -> dict[str, set[str]]:
    """Each field of a config class -> the attributes by which the rest may read it: itself and its properties."""
    fields: dict[str, set[str]] = {}
    for node in [*MODULES["config"].tree.body, *MODULES["cli.configs"].tree.body]:
        if isinstance(node, ast.ClassDef):
            own = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
            for name in own:
                fields.setdefault(name, {name})
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name != "__post_init__":
                    for inner in ast.walk(method):
                        if isinstance(inner, ast.Attribute) and inner.attr in own:
                            fields[inner.attr].add(method.name)
    return fields


def test_every_option_is_read_somewhere():
    read = set()
    for name, module in MODULES.items():
        for node in ast.walk(module.tree):
            if (
                name not in ("config", "cli.configs")
                and isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load)
            ):
                holder = ast.unparse(node.value).rpartition(".")[2]
                read |= {node.attr} if holder in HOLDERS else set()
    fields = option_fields()
    assert len(fields) > 60  # the parsing above found them
    assert [name for name, ways in fields.items() if not ways & read] == []


def test_every_option_has_a_help_text():
    kinds = [
        value
        for module in (config, configs)
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    assert {config.TrainConfig, config.Sampling} < set(kinds)
    for kind in kinds:
        for item in kind.__dataclass_fields__.values():
            grouped = item.name in GROUPS and kind is not config.DataConfig
            assert bool(item.metadata["help"]) is not grouped, f"{kind.__name__}.{item.name}"


def test_the_public_names():
    assert onebase.__all__ == list(onebase._HOMES)
    assert len(onebase.__all__) <= 12
    for name, home in onebase._HOMES.items():
        assert getattr(onebase, name) is getattr(importlib.import_module(f"onebase.{home}"), name)
    shown = {
        alias.name
        for node in ast.walk(MODULES["__init__"].tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onebase")
        for alias in node.names
    }
    assert shown == set(onebase.__all__)  # what a type checker is told
    with pytest.raises(AttributeError, match="no attribute 'lode_base'"):
        _ = onebase.lode_base


WRITTEN = ("README.md", "Makefile", "pyproject.toml", "constraints.txt")
FOLDERS = ("src/onebase", "docs", "examples", "benchmarks")


def test_no_path_of_one_machine_is_written_down():
    files = [ROOT / name for name in WRITTEN]
    files += [
        p
        for folder in FOLDERS
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".md", ".yaml", ".j2")
    ]
    assert len(files) > len(MODULES)
    machine = re.compile(r"(?<![\w./])/(?:work|tmp|root|home|Users|mnt)/")
    assert [
        str(f.relative_to(ROOT))
        for f in files
        if f.exists() and machine.search(f.read_text(encoding="utf-8"))
    ] == []
