"""Everything that must hold before the first step: rows read, encoded and gated, targets matched, batches proven."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from onebase.adapters.adapter import Adapter, Origin
from onebase.adapters.injection import adapter_for
from onebase.adapters.layers import base_modules
from onebase.adapters.targets import Coverage, first_layer, match
from onebase.adapters.variants import INITS, check_start
from onebase.config import DataConfig, LoraConfig, OptimConfig, TrainConfig
from onebase.data.checks import Finding, added_untrained_ids, check, enforce
from onebase.data.labels import Head, check_labels, describe_labels, learn_head
from onebase.data.pairs import check_pairs, describe_pairs
from onebase.data.preview import DataSummary, summarise
from onebase.data.read import Example, read_examples
from onebase.data.split import split_examples
from onebase.data.template import EncodedSet, PromptFormat, encode
from onebase.embedding import encode_texts
from onebase.errors import BaseError, ConfigError, TargetError
from onebase.models.base import Base
from onebase.models.embedder import stated
from onebase.models.scoring import Way, choose
from onebase.models.vocabulary import Vocabulary, resolve_tokens
from onebase.prediction import encode_rows
from onebase.tasks import CAUSAL, EMBED
from onebase.training.optim import usual_lr
from onebase.training.warmstart import WarmStart, warm_start


@dataclass(frozen=True)
class Data:
    """The rows of a run as read and as tokens."""

    train: list[Example]
    valid: list[Example]
    train_rows: EncodedSet
    valid_rows: EncodedSet
    form: PromptFormat
    summary: DataSummary
    head: Head | None = None  # what the labels call for

    @property
    def digest(self) -> str:
        """A digest of what the model is trained and scored on."""
        rows = [(row.ids, row.loss) for part in (self.train_rows, self.valid_rows) for row in part.rows]
        labels = [row.label for part in (self.train_rows, self.valid_rows) for row in part.rows]
        told = repr((rows, labels, self.head.as_dict()) if self.head else rows)
        return hashlib.sha256(told.encode()).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A run that may start."""

    data: Data
    coverage: Coverage
    way: Way  # how rows are scored
    allowed: tuple[str, ...]  # gates that failed and were overridden
    words: Vocabulary  # the base with a tokenizer that knows the run's added tokens
    start: WarmStart | None = None  # the adapter that the run goes on from


def read_data(
    base: Base, config: DataConfig, seed: int, trained: tuple[str, ...] = (), tokens: tuple[int, ...] = ()
) -> Data:
    """Read, split and encode the rows, and check them; the summary lists the gates that fail.

    `trained` are the modules that the run trains in full, `tokens` the ids whose rows it trains: special tokens are
    learnt if the embedding is among the first, or they among the others.
    """
    if config.task == EMBED:
        return _read_pairs(base, config, seed)
    if config.task != CAUSAL:
        return _read_labelled(base, config, seed)
    tokenizer = tokenizer_of(base)
    train, valid = _parts(config, seed)
    train_rows = encode(tokenizer, train, config, base.stop_ids, base.context)
    valid_rows = encode(tokenizer, valid, config, base.stop_ids, base.context)
    frozen = not any("embed" in name or "wte" in name for name in trained)
    untrained = added_untrained_ids(tokenizer, _embedding(base)) if frozen else frozenset[int]()
    findings = check(train_rows, tokenizer, base.stop_ids, untrained - set(tokens))
    form = PromptFormat.of(config, train)
    return Data(train, valid, train_rows, valid_rows, form, summarise(train, train_rows, findings))


def _parts(config: DataConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """The rows to train on and those held out."""
    examples = read_examples(config.data, config)
    if config.validation:
        return examples, read_examples(config.validation, config)
    return split_examples(examples, config.holdout, bool(config.split_by), seed)


def _read_labelled(base: Base, config: DataConfig, seed: int) -> Data:
    """`read_data` of rows with labels. Raises DataError where these cannot be learnt."""
    train, valid = _parts(config, seed)
    head = learn_head(config.task, train)
    train_rows, valid_rows = (encode_rows(base, part, head, config) for part in (train, valid))
    findings = check_labels(head, train_rows)
    summary = summarise(train, train_rows, findings, describe_labels(head, train_rows))
    return Data(train, valid, train_rows, valid_rows, PromptFormat(), summary, head)


def _read_pairs(base: Base, config: DataConfig, seed: int) -> Data:
    """`read_data` of rows whose texts belong together."""
    base = base if base.embedder else base.with_embedder(stated(base.folder, config.pooling))
    train, valid = _parts(config, seed)
    train_rows, valid_rows = (encode_texts(base, part, config) for part in (train, valid))
    findings = check_pairs(train_rows, base.tokenizer.all_special_ids if base.tokenizer else ())
    summary = summarise(train, train_rows, findings, pairs=describe_pairs(train_rows))
    return Data(train, valid, train_rows, valid_rows, PromptFormat(), summary)


def settled(base: Base, config: TrainConfig) -> TrainConfig:
    """The config with the learning rate that is usual for this base, where it names none."""
    return with_lr(config, usual_lr(base.width))


def with_lr(config: TrainConfig, lr: float) -> TrainConfig:
    """The config with this learning rate, where it names none."""
    return config if config.optim.lr else replace(config, optim=replace(config.optim, lr=lr))


def with_task(base: Base, config: TrainConfig, data: Data | None = None) -> tuple[Base, Data | None]:
    """The base as the run's task needs it, with a head that is drawn for the labels or as a maker of vectors, and the
    rows if they were read."""
    if config.data.task == CAUSAL:
        return base, data
    if config.shard_base:
        found = "a head and a vector need whole weights"
        raise ConfigError("options task and shard_base", found, hint="leave out --shard-base")
    if config.data.task == EMBED:
        _check_batch(config)
        told = stated(base.folder, config.data.pooling, config.data.similarity_scale)
        return base.with_embedder(told), data
    data = data or read_data(base, config.data, config.seed)
    assert data.head is not None
    return base.with_head(data.head, config.seed), data


def _check_batch(config: TrainConfig) -> None:
    if config.optim.batch_size < 2:
        found = "an anchor learns to find its positive among those of its batch"
        raise ConfigError(
            "options task=embed and batch_size=1", found, hint="give at least 2, better 16 or more"
        )


def tokenizer_of(base: Base) -> Any:
    """The base's tokenizer; an error where the base cannot be trained on text."""
    if base.kind != "causal":
        found = f"a base of kind {base.kind}; this needs a causal language model"
        hint = (
            "an encoder learns labels or vectors: --task classify, regress or embed"
            if base.kind == "encoder"
            else ""
        )
        raise BaseError(f"train on {base.ref}", found, hint=hint)
    if base.tokenizer is None:
        raise BaseError(f"train on {base.ref}", "it has no tokenizer files")
    return base.tokenizer


def _embedding(base: Base) -> Any:
    return base.model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]


def prepare(base: Base, config: TrainConfig, data: Data | None = None) -> Prepared:
    """Check everything and give what the run needs. Raises the first OnebaseError; nothing is written yet.

    `data`: what a run with the same options about rows and tokens and the same seed has read.
    """
    allowed, saved = config.data.allowed, tuple(config.lora.modules_to_save)
    lora = replace(config.lora, modules_to_save=(*saved, *(path for path in base.drawn if path not in saved)))
    words = resolve_tokens(base, lora.trainable_tokens)  # pyright: ignore[reportArgumentType]
    warm = warm_start(base, config, words)
    coverage = warm.coverage if warm else _without_unused(match(base.model, lora), base)
    check_start(lora, coverage.targets, dict(base_modules(base.model)))
    _check_frozen(coverage, config.optim)
    _check_new_tokens(words, lora)
    data = data or read_data(words.base, config.data, config.seed, coverage.full, words.ids)
    _check_head(data.head, base, warm)
    findings = [*data.summary.findings, *_uneven(coverage), *(warm.findings if warm else ())]
    overridden = enforce(findings, allowed)
    _check_sizes(data, lora)
    probe = warm.adapter if warm else _probe(base, coverage, config, words)
    way = _way(base, config, probe, data)
    if config.optim.cache_activations:
        _check_below(way, coverage)
    return Prepared(data, coverage, way, tuple(finding.gate for finding in overridden), words, warm)


def _without_unused(coverage: Coverage, base: Base) -> Coverage:
    """The coverage without what `all-linear` or a name's end matched in modules that make no vector.

    Raises TargetError where nothing else was matched.
    """
    kept = [t for t in coverage.targets if not any(t.path.startswith(f"{name}.") for name in base.unused)]
    if coverage.targets and not kept:
        told = ", ".join(target.path for target in coverage.targets)
        raise TargetError(f"target_modules {told}", "takes no part in making vectors")
    return replace(coverage, targets=tuple(kept))


def _check_head(head: Head | None, base: Base, warm: WarmStart | None) -> None:
    """Raise ConfigError where the adapter that the run goes on from has another head than the rows call for."""
    if head is None or warm is None:
        return
    told = warm.adapter.origin.head
    lacking = [path for path in base.drawn if path not in warm.adapter.full]
    asked = f"options task={head.task} and start"
    if lacking:
        raise ConfigError(
            asked, f"the adapter to go on from lacks {', '.join(lacking)}", hint="leave out --start"
        )
    if told and Head.from_dict(told).labels != head.labels:
        found = f"the adapter's labels are {Head.from_dict(told).labels}, the rows' {head.labels}"
        raise ConfigError(asked, found, hint="leave out --start")


def _way(base: Base, config: TrainConfig, probe: Adapter, data: Data) -> Way:
    asked = config.optim.engine
    if not config.shard_base:
        return choose(base, asked, probe, data.train_rows.rows)
    if asked == "engine":
        found = "the engine reads weights where they are, and a sharded base's are in several processes"
        raise ConfigError("options engine and shard_base", found, hint="use --engine auto")
    way = choose(base, asked, None)  # without an adapter the engine is no choice
    return way._replace(reason="the base is sharded") if way.name == "packed" else way


def _check_below(way: Way, coverage: Coverage) -> None:
    """Raise ConfigError where no layer's states could be kept."""
    if way.name != "engine":
        raise ConfigError(
            "option cache_activations", f"only the engine keeps states; this run is {way.shown}"
        )
    if first_layer(coverage.targets) == 0:
        found = "the adapter begins at the first layer, so nothing lies below it"
        raise ConfigError(
            "option cache_activations", found, hint="put it on the last layers alone: --layers 20-29"
        )


def _probe(base: Base, coverage: Coverage, config: TrainConfig, words: Vocabulary) -> Adapter:
    """An adapter of the run's shape, to prove a way of scoring with; where it starts does not matter for that."""
    lora = replace(config.lora, init="default", trainable_tokens=words.names)
    return adapter_for(base.model, coverage, lora, config.seed, Origin(tokens=words.new), {})


def _uneven(coverage: Coverage) -> list[Finding]:
    if not coverage.uneven:
        return []
    fix = "say which layers are meant with --layers, or name targets that every layer has"
    return [Finding("uneven-targets", (), "; ".join(coverage.uneven) + f"\n    fix: {fix}")]


def _check_new_tokens(words: Vocabulary, lora: LoraConfig) -> None:
    beyond = [text for text, token in words.new.items() if token >= len(_embedding(words.base))]
    if beyond and INITS[lora.init].needs in ("inputs", "gradients"):
        found = f"it runs the plain base, which has no rows for new tokens ({', '.join(beyond)})"
        raise ConfigError(f"option init={lora.init}", found, hint="choose a start that needs no data")


def _check_frozen(coverage: Coverage, optim: OptimConfig) -> None:
    embeddings = [target.path for target in coverage.targets if target.site.kind == "embedding"]
    if optim.freeze_a and embeddings:
        found = f"{embeddings[0]} is an embedding, whose A starts at 0: it would learn nothing"
        raise ConfigError("option freeze_a", found, hint="leave it out with --exclude-modules")


def _check_sizes(data: Data, lora: LoraConfig) -> None:
    if not data.train_rows.rows:
        raise ConfigError(
            "option overlong=drop", "leaves no training row", hint="raise --max-length or truncate"
        )
    if lora.dropout and not lora.target_modules:
        raise ConfigError(
            "options dropout and target_modules", "dropout acts on low-rank updates, and there are none"
        )
