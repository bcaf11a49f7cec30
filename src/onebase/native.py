"""Native code: C sources built once with the system's compiler into the cache folder, for this very processor.

Nothing here is needed: whoever loads a library has the same arithmetic in torch for machines without a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from onebase.errors import OnebaseError
from onebase.files import atomic_file, cache_home

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11", "-shared", "-fPIC")
_SECONDS = 120  # for the compiler; it takes a few


def load(name: str, sources: Sequence[Path], macros: Sequence[str] = ()) -> ctypes.CDLL | str:
    """The library of these sources, from the cache folder if it is there; or, as a text, why there is none.

    Headers (.h) among the sources are read by the others. Each of `macros` is defined for the compiler.
    """
    compiler = next((found for one in COMPILERS if (found := shutil.which(one))), None)
    if compiler is None:
        return "no C compiler was found"
    defined = [f"-D{macro}" for macro in macros]
    # Built for this very processor, so another one that shares the folder builds its own.
    about = "\n".join([compiler, *FLAGS, *defined, torch.__version__, platform.machine(), _processor()])
    texts = b"".join(source.read_bytes() for source in sources)
    target = cache_home() / "native" / f"{name}-{hashlib.sha256(texts + about.encode()).hexdigest()[:16]}.so"
    compiled = [str(source) for source in sources if source.suffix == ".c"]
    try:
        if not target.exists():
            _build([compiler, *FLAGS, *defined, *compiled], target)
        return ctypes.CDLL(str(target))
    except (OSError, OnebaseError, subprocess.SubprocessError) as error:
        return f"the {name} cannot be built: {str(error).splitlines()[0]}"


def _processor() -> str:
    """What tells this processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _build(command: Sequence[str], target: Path) -> None:
    """Build with threads, or without where the compiler has no OpenMP."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # torch brings an OpenMP of its own: a second one beside it would mean a second set of threads.
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    ways = [["-fopenmp", *map(str, own)], []]
    with atomic_file(target) as temporary:
        for number, more in enumerate(ways):
            last = number == len(ways) - 1
            whole = [*command, "-o", str(temporary), *more, "-lm"]
            done = subprocess.run(whole, capture_output=True, check=last, timeout=_SECONDS)
            if not done.returncode:
                return
