"""A GGUF file to a dense safetensors folder, once; later loads map that folder into memory."""

from __future__ import annotations

import io
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from onebase.errors import BaseError
from onebase.files import atomic_folder, process_lock
from onebase.models.builtin import Notify, file_sha256, logger
from onebase.models.fingerprint import remembered

_CONVERSION = 1  # part of the folder's name: raise it when the conversion writes something else


@contextmanager
def quiet() -> Generator[None]:
    """Keep transformers' progress bars and notices off the screen; what matters is raised by the caller."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        with warnings.catch_warnings(action="ignore"):  # it warns where the environment switched bars off
            if bars:
                transformers_logging.enable_progress_bar()
            (enable_progress_bars if hub_bars else disable_progress_bars)()


def converted_folder(cache: Path, gguf_sha256: str) -> Path:
    """Where the conversion of the GGUF file with that digest is, or will be."""
    return cache / "bases" / f"{gguf_sha256[:16]}-{_CONVERSION}"


def convert_gguf(gguf: Path, cache: Path, notify: Notify = logger.info) -> Path:
    """The folder in `cache` with the file's model in float32, its configuration, tokenizer and chat template.

    Converts on the first call only; processes that start together take turns, an interrupted one leaves nothing.
    Raises BaseError where the file is not a GGUF, is cut short, or holds an unsupported architecture.
    """
    with gguf.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise BaseError(f"{gguf} is not a GGUF file", "it does not begin with the bytes GGUF")
    folder = converted_folder(cache, remembered("file", [gguf], lambda: file_sha256(gguf)))
    if not folder.exists():
        with process_lock(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():
                notify(f"converting {gguf.name} to safetensors in {folder} (once)")
                with atomic_folder(folder) as temporary:
                    _convert(gguf, temporary)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dense = GgufConfig(dequantize=True)
    # The reader draws its progress bar straight to stderr, past transformers' own switch.
    with quiet(), redirect_stderr(io.StringIO()):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, quantization_config=dense, output_loading_info=True
            )
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(**source)
        except Exception as error:  # a foreign reader: a broken file fails in it in many ways
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BaseError(
                f"cannot convert {gguf}",
                f"cut short, damaged or not supported ({reason[0]})",
                hint="fetch the file again, or give the model as a safetensors folder",
            ) from error
        require_complete(str(gguf), info)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def require_complete(what: str, loading_info: Mapping[str, Any]) -> None:
    """Raise BaseError, listing every name, where transformers' loading report is not clean.

    transformers fills a missing weight with noise and drops an unexpected one, each with a warning.
    """
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    found = {kind: sorted(map(str, loading_info.get(kind) or ())) for kind in kinds}
    lines = [f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in found.items() if names]
    if lines:
        raise BaseError(f"the weights of {what} do not fit its configuration", "\n  ".join(lines))
