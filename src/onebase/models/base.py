"""A base model, frozen: found by name, folder or file, checked, loaded memory-mapped, and fingerprinted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from onebase.adapters.adapter import Adapter
from onebase.adapters.layers import base_modules
from onebase.data.labels import Head
from onebase.device import pick_device, pick_dtype
from onebase.errors import BaseError, OnebaseError, nearest
from onebase.files import cache_home
from onebase.models.builtin import BUILTINS, FOLDERS, Notify, fetch_builtin, fetch_folder, logger
from onebase.models.embedder import Embedder, stated
from onebase.models.fingerprint import fingerprint_files, fingerprint_model
from onebase.models.gguf import convert_gguf, converted_folder, quiet, require_complete
from onebase.models.heads import add_head, head_of
from onebase.storage.shards import INDEX, SINGLE, list_tensors

Kind = Literal["causal", "encoder", "seq2seq", "classifier", "embedder"]

UNBOUNDED = 1 << 30  # context of a base that states none

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*", SINGLE, "model-*.safetensors"]
_HUB_FOLDERS = ["[!1]*/*"]  # left out; 1_Pooling says how a sentence encoder pools
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Base:
    """A frozen base model and what the rest needs to know about it.

    `ref` is what was asked for, `name` what an adapter's `base_model_name_or_path` says. `context` is the largest
    number of positions, `stored_bytes` the size of the stored tensors (in memory: of the model's own).
    """

    model: nn.Module
    tokenizer: Any | None
    ref: str
    name: str
    kind: Kind
    fingerprint: str
    dtype: str
    dtype_reason: str
    device: torch.device
    context: int
    stop_ids: tuple[int, ...]
    pad_id: int
    stored_bytes: int
    head: Head | None = None  # what a model with a head says of a text
    drawn: tuple[str, ...] = ()  # the paths of the head's modules, which no base has stored
    folder: Path | None = None  # where it was loaded from
    embedder: Embedder | None = None  # how texts become vectors, where that is what is wanted of it
    unused: tuple[str, ...] = ()  # the paths of modules that take no part in that

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def width(self) -> int | None:
        """Values of a hidden state; None where the model has no single number of them."""
        config: Any = getattr(self.model, "config", None)
        return getattr(config.get_text_config(), "hidden_size", None) if config else None

    def with_head(self, head: Head, seed: int = 0) -> Base:
        """This base with a freshly drawn head around its modules. Raises BaseError where it can have none."""
        model, drawn = add_head(self.model, head.outputs, seed, self.pad_id)
        return replace(self, model=model, kind="classifier", head=head, drawn=drawn)

    @property
    def reader(self) -> Head | Embedder | None:
        """What makes something of a whole text: a label or a vector. None where the base writes text."""
        return self.head or self.embedder

    def with_embedder(self, embedder: Embedder) -> Base:
        """This base as a maker of vectors: the model without a decoder's output head, or a whole encoder.

        That is what PEFT's FEATURE_EXTRACTION adapters are for. Raises BaseError for an encoder with a decoder.
        """
        if self.kind not in ("causal", "encoder", "embedder"):
            found = f"a base of kind {self.kind}"
            raise BaseError(
                f"vectors of {self.ref}", found, hint="use an encoder such as minilm, or a decoder"
            )
        model: Any = self.model
        body = model.base_model if self.kind == "causal" else model
        unused = tuple(name for name in ("pooler",) if getattr(body, name, None) is not None)
        return replace(self, model=body, kind="embedder", embedder=embedder, unused=unused)

    def for_adapter(self, adapter: Adapter | None) -> Base:
        """This base with the head that an adapter was trained with, or as the maker of vectors that it is for; as it
        is for any other adapter, or for None.

        Raises BaseError where the adapter lacks a module that no base has stored, and so must bring.
        """
        if adapter is not None and adapter.origin.embeds and self.reader is None:
            told = adapter.origin.head
            return self.with_embedder(Embedder.from_dict(told) if told else stated(self.folder))
        if adapter is None or not adapter.origin.has_head or self.reader is not None:
            return self
        if {*adapter.full} <= {path for path, _ in base_modules(self.model)}:  # the model came with a head
            return replace(self, head=head_of(adapter)) if adapter.full else self
        headed = self.with_head(head_of(adapter))
        if lacking := [path for path in headed.drawn if path not in adapter.full]:
            found = f"it has no tensors of {', '.join(lacking)}, which the base has not stored either"
            raise BaseError(
                "an adapter with a head", found, hint="name them in modules_to_save when it is trained"
            )
        return headed


def load_base(
    ref: str | Path, dtype: str = "auto", device: str = "auto", notify: Notify = logger.info
) -> Base:
    """Load a built-in base, a model folder, a `.gguf` file or a hub name.

    The weights are mapped from disk where the stored dtype is the chosen one. Code from a repository never runs, and
    pickled weights are never read. Raises BaseError (not found, not fetched, not usable), FormatError (broken
    safetensors) or ConfigError (device, dtype).
    """
    chosen_device = pick_device(device)
    folder = locate_base(ref, notify)
    check_folder(ref, folder)
    stored = list_tensors(folder)
    choice = pick_dtype(dtype, chosen_device)
    kind, model = _load_model(folder, getattr(torch, choice.dtype), notify)
    tokenizer = _read_tokenizer(folder)
    _check_vocabulary(ref, model, tokenizer)
    return Base(
        model=_frozen(model).to(chosen_device),
        tokenizer=tokenizer,
        ref=str(ref),
        name=str(Path(ref)) if Path(ref).exists() else str(ref),
        kind=kind,
        folder=folder,
        fingerprint=fingerprint_files(folder),
        dtype=choice.dtype,
        dtype_reason=choice.reason,
        device=chosen_device,
        stored_bytes=sum(info.end - info.start for info in stored),
        **_limits(kind, model, tokenizer),
    )


def wrap_base(model: nn.Module, tokenizer: Any | None = None, name: str = "in-memory") -> Base:
    """A Base around a model the caller made; it is frozen and put in eval mode, its weights stay as they are."""
    first = next(model.parameters())
    kind = _kind_in_memory(model)
    _check_vocabulary(name, model, tokenizer)
    return Base(
        model=_frozen(model),
        tokenizer=tokenizer,
        ref=name,
        name=name,
        kind=kind,
        fingerprint=fingerprint_model(model),
        dtype=str(first.dtype).removeprefix("torch."),
        dtype_reason="the given model's",
        device=first.device,
        stored_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        **_limits(kind, model, tokenizer),
    )


def open_tokenizer(ref: str | Path, notify: Notify = logger.info) -> Any | None:
    """The base's tokenizer without its weights' loading; None where it has none. Raises BaseError as `load_base`."""
    return _read_tokenizer(locate_base(ref, notify))


def locate_base(ref: str | Path, notify: Notify = logger.info) -> Path:
    """The local folder of a base; fetches and converts where needed. Raises BaseError where that fails."""
    name, path = str(ref), Path(ref).expanduser()
    if name in BUILTINS:
        folder = converted_folder(cache_home(), BUILTINS[name].gguf_sha256)
        if folder.exists():
            return folder
        return convert_gguf(fetch_builtin(BUILTINS[name], cache_home(), notify), cache_home(), notify)
    if name in FOLDERS:
        return fetch_folder(FOLDERS[name], cache_home(), notify)
    if path.is_file():
        return convert_gguf(path, cache_home(), notify)
    if path.is_dir():
        return path
    if path.suffix != ".gguf" and _HUB_NAME.fullmatch(name):
        return _hub_folder(name)
    raise BaseError(f"base {name!r}", "no such file or folder", _similar(name))


def _similar(name: str) -> list[str]:
    """The nearest built-in names, and folders or .gguf files beside the one asked for."""
    parent = Path(name).expanduser().parent
    beside = sorted(parent.iterdir()) if parent.is_dir() else []
    near = [str(path) for path in beside if path.suffix == ".gguf" or (path / "config.json").exists()]
    return nearest(name, [*BUILTINS, *FOLDERS, *near])


def _hub_folder(name: str) -> Path:
    """The hub's snapshot of `name`: the local copy if it is whole, else a download of the safetensors files."""
    try:
        local = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        if (local / "config.json").exists() and _has_weights(local):
            return local
    except OSError:
        pass  # not in the local cache
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FOLDERS)
        )
    except GatedRepoError as error:
        found, hint, cause = (
            "its owner grants access one by one",
            "ask on its page, then `hf auth login`",
            error,
        )
    except RepositoryNotFoundError as error:
        found, hint, cause = "no such folder, and no such repository on the hub", "", error
    except Exception as error:  # the network fails in many ways
        found = f"no such folder, not cached, and the hub cannot be reached ({str(error).splitlines()[0]})"
        hint, cause = "go online once, or give a model folder, a .gguf file or a built-in base", error
    # `owner/name` can only be meant for the hub; a bare word may be a misspelt built-in or folder.
    raise BaseError(f"base {name!r}", found, [] if "/" in name else _similar(name), hint) from cause


def _has_weights(folder: Path) -> bool:
    try:
        return bool(list_tensors(folder))
    except OnebaseError:
        return False


def check_folder(ref: str | Path, folder: Path) -> None:
    """Raise BaseError where the folder is not a base with dense safetensors weights."""
    asked = f"base {str(ref)!r}"
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = _read_json(asked, adapter).get("base_model_name_or_path")
        raise BaseError(asked, "an adapter, not a base", hint=f"its base is {base!r}: name that as the base")
    if not (folder / "config.json").exists():
        raise BaseError(asked, f"no config.json in {folder}", _similar(str(ref)))
    quantised = _read_json(asked, folder / "config.json").get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "unknown method")
        raise BaseError(
            asked, f"its weights are quantised ({method})", hint="use the dense model or a GGUF file"
        )
    if not ((folder / SINGLE).exists() or (folder / INDEX).exists()):
        pickles = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES))
        hint = f"pickled weights ({pickles}) are never read, they may run code: convert them to safetensors"
        raise BaseError(asked, f"no {SINGLE} or {INDEX} in {folder}", hint=hint if pickles else "")


def _read_json(asked: str, path: Path) -> dict[str, Any]:
    try:
        match json.loads(path.read_text(encoding="utf-8")):
            case {**fields}:
                return fields
            case _:
                raise BaseError(asked, f"{path} is no JSON object")
    except (ValueError, OSError) as error:
        raise BaseError(asked, f"cannot read {path} ({error})") from error


def _names(mapping: Iterable[Any]) -> set[str]:
    return {name for names in mapping for name in ([names] if isinstance(names, str) else names)}


def family_of(architecture: str) -> tuple[Kind, Any] | None:
    """The kind of an architecture and transformers' loader for it; None for models of other than text."""
    decoders = _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if architecture in decoders and architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal", AutoModelForCausalLM
    if architecture in _names(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()):
        return "seq2seq", AutoModelForSeq2SeqLM
    if architecture.endswith("ForConditionalGeneration"):
        return None
    return "encoder", AutoModel


def _load_model(folder: Path, dtype: torch.dtype, notify: Notify) -> tuple[Kind, Any]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    # Mismatched sizes are let through only to be named by `require_complete`, with the other misfits.
    loading = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, **options)
            architecture = (config.architectures or ["none named"])[0]
            family = family_of(architecture) if config.architectures else None
            if family is None:
                raise BaseError(f"cannot load {folder}", f"architecture {architecture}: not a text model")
            kind, loader = family
            model, info = loader.from_pretrained(folder, config=config, dtype=dtype, **loading, **options)
        except OnebaseError:
            raise
        except Exception as error:  # transformers reports a bad checkpoint in many ways
            raise BaseError(f"cannot load {folder}", str(error).strip() or type(error).__name__) from error
    if kind == "encoder" and architecture != type(model).__name__:
        info = _without_heads(model, info, notify)
    require_complete(str(folder), info)
    return kind, model


def _without_heads(model: Any, info: dict[str, Any], notify: Notify) -> dict[str, Any]:
    """An encoder out of a model with a task head: the head is left out, a pooler it never had is taken off."""
    own = (f"{model.base_model_prefix}.", *(f"{name}." for name, _ in model.named_children()))
    heads = sorted(name for name in info["unexpected_keys"] if not name.startswith(own))
    if heads:
        notify(f"using the encoder alone, without its task head ({', '.join(heads)})")
    missing = set(info["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler, missing = None, set()
    return info | {"missing_keys": missing, "unexpected_keys": set(info["unexpected_keys"]) - set(heads)}


def _kind_in_memory(model: nn.Module) -> Kind:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    can_generate = getattr(model, "can_generate", None)
    return "causal" if can_generate is not None and can_generate() else "encoder"


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def _read_tokenizer(folder: Path) -> Any | None:
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        return None
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers reports a bad tokenizer in many ways
            raise BaseError(f"cannot read the tokenizer in {folder}", str(error).strip()) from error


def _check_vocabulary(ref: str | Path, model: Any, tokenizer: Any | None) -> None:
    """Raise BaseError where the tokenizer can give an id that the embedding has no row for."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if tokenizer is not None and embedding is not None and len(tokenizer) > embedding.weight.shape[0]:
        raise BaseError(
            f"base {str(ref)!r}",
            f"its tokenizer knows {len(tokenizer)} tokens, its embedding only {embedding.weight.shape[0]}",
            hint="the tokenizer belongs to another model, or tokens were added without resizing the embedding",
        )


def _limits(kind: Kind, model: Any, tokenizer: Any | None) -> dict[str, Any]:
    """Context length, stop ids and pad id, from the configuration and the tokenizer."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = [getattr(text, name, None) for name in _CONTEXT_NAMES]
    limits = [value for value in stated if isinstance(value, int) and value > 0][:1]
    if kind == "encoder" and tokenizer is not None:
        limits.append(tokenizer.model_max_length)  # RoBERTa's position table is longer than its context
    stops = _stop_ids(model, tokenizer)
    pads = [getattr(source, "pad_token_id", None) for source in (tokenizer, text)]
    return {
        "context": min([UNBOUNDED, *limits]),
        "stop_ids": stops,
        # Without a pad token any id will do, padding is masked; the vocabulary is never extended for it.
        "pad_id": next((pad for pad in pads if pad is not None and pad >= 0), min(stops, default=0)),
    }


def _stop_ids(model: Any, tokenizer: Any | None) -> tuple[int, ...]:
    generation = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed: list[Any] = generation if isinstance(generation, list) else [generation]
    return tuple(
        sorted({stop for stop in [getattr(tokenizer, "eos_token_id", None), *listed] if stop is not None})
    )
