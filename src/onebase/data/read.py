"""Training rows from a file (.jsonl .json .csv .parquet) or a hub dataset; every error names its row."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from onebase.config import DataConfig
from onebase.errors import ConfigError, DataError, MissingFile, nearest

Kind = Literal[
    "messages", "completion", "text", "labelled", "labelled pair", "pair", "triplet", "positive pair"
]
Message = Mapping[str, str]
Label = str | int | float | bool
NumberedRow = tuple[int, Mapping[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")

# How an error names what it found; a JSON user does not know Python's names.
TYPE_NAMES = {
    "dict": "an object",
    "list": "a list",
    "str": "text",
    "bool": "true or false",
    "int": "a number",
    "float": "a number",
    "NoneType": "null",
}

# The columns of each kind of row.
KINDS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "labelled pair": ("text", "text_pair", "label"),
    "labelled": ("text", "label"),
    "pair": ("text", "text_pair"),
    "triplet": ("anchor", "positive", "negative"),
    "positive pair": ("anchor", "positive"),
}
# The kinds that a task (tasks.TaskName) learns from, in the order in which they are looked for.
OF_TASK: dict[str, tuple[Kind, ...]] = {
    "causal": ("messages", "completion", "text"),
    "classify": ("labelled pair", "labelled"),
    "regress": ("labelled pair", "labelled"),
    "embed": ("triplet", "positive pair"),
}
UNLABELLED: tuple[Kind, ...] = ("pair", "text")
COLUMNS = tuple(dict.fromkeys(itertools.chain(*KINDS.values())))

# Names other datasets use. They are never guessed, only offered as the --map that would fit.
ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversations", "conversation", "chat", "dialogue"),
    "prompt": ("question", "instruction", "query", "input", "source", "article", "document"),
    "completion": ("answer", "response", "output", "target", "summary", "highlights", "chosen"),
    "text": ("content", "body", "document", "sentence", "review", "sentence1", "premise", "text1"),
    "text_pair": ("sentence2", "hypothesis", "text2"),
    "label": ("class", "category", "stars", "rating", "score", "sentiment", "labels"),
    "anchor": ("query", "question", "sentence1", "premise", "text1", "prompt", "title"),
    "positive": ("answer", "passage", "document", "sentence2", "entailment", "text2", "pos", "completion"),
    "negative": ("hard_negative", "negative_1", "contradiction", "neg", "sentence3"),
}


@dataclass(frozen=True)
class Example:
    """One row: `text`, or `prompt` and `completion`, or `messages`; a text may have a `label` and a second text.
    Or an `anchor` and a `positive`, whose vectors are to be near, maybe with a `negative`, which is to be far.

    `row` counts from 1: the line of a JSONL file, the record of any other source. `group` is the value of
    the `split_by` column as text ("" without one).
    """

    row: int
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    group: str = ""
    text_pair: str | None = None
    label: Label | None = None
    anchor: str | None = None
    positive: str | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        given = tuple(name for name in COLUMNS if getattr(self, name) is not None)
        if given not in KINDS.values():
            raise DataError(
                f"row {self.row}", f"holds {', '.join(given) or 'nothing'}; needs one of: {_wanted(KINDS)}"
            )

    @property
    def kind(self) -> Kind:
        """Which kind of row this is."""
        given = {name for name in COLUMNS if getattr(self, name) is not None}
        return next(kind for kind, names in KINDS.items() if given == set(names))


def _wanted(kinds: Iterable[Kind]) -> str:
    return "; ".join(" and ".join(KINDS[kind]) for kind in kinds)


def read_examples(source: str, config: DataConfig, kinds: Sequence[Kind] = ()) -> list[Example]:
    """All rows of `source` (at most `config.limit`) as Examples of one of these kinds (by default the task's).

    Raises MissingFile where there is no such file or dataset, ConfigError for a map that names no column of
    ours, and DataError (with row and column names) for everything in the file that cannot be used.
    """
    if not source:
        raise ConfigError("option data", "is empty", hint="name a file or a hub dataset: --data rows.jsonl")
    rows = _rows(source, config)
    if config.limit:
        rows = itertools.islice(rows, config.limit)
    first = next(rows, None)
    if first is None:
        raise DataError(f"data {source}", "holds no rows")
    columns = _columns(source, tuple(first[1]), config, kinds or OF_TASK[config.task])
    group = _group_column(source, tuple(first[1]), columns, config)
    return [_example(source, row, columns, group) for row in itertools.chain([first], rows)]


# -- Sources: each yields (row number, columns) and knows nothing about what the columns mean.


def _rows(source: str, config: DataConfig) -> Iterator[NumberedRow]:
    path = Path(source).expanduser()
    if path.is_file():
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"data {source}", f"cannot read {path.suffix or 'files without a suffix'}", READERS
            )
        return reader(path)
    if path.is_dir():
        names = [item.name for item in path.iterdir() if item.suffix.lower() in READERS]
        raise DataError(f"data {source}", "is a folder; name one file in it", sorted(names)[:8])
    if _looks_like_path(source, path):
        raise _missing(source, path)
    return _read_hub(source, config.split)


def _looks_like_path(source: str, path: Path) -> bool:
    """A hub name is `name` or `owner/name`; `data/rows` beside a real folder `data` is meant as a file."""
    known = path.suffix.lower() in READERS
    in_folder = path.parent != Path() and path.parent.is_dir()
    return known or in_folder or source.startswith((".", "/", "~")) or source.count("/") > 1


def _missing(source: str, path: Path) -> MissingFile:
    if not path.parent.is_dir():
        return MissingFile(f"data {source}", f"there is no folder {path.parent}")
    files = [item.name for item in path.parent.iterdir() if item.suffix.lower() in READERS]
    return MissingFile(f"data {source}", "no such file", nearest(path.name, files))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, numbered from 1, without a byte order mark; each keeps its line end."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                found = f"row {number} is not UTF-8: {error.reason} at byte {error.start + 1} of the line"
                raise DataError(f"data {path}", found, hint="save the file as UTF-8") from error


def _read_jsonl(path: Path) -> Iterator[NumberedRow]:
    for number, line in _lines(path):
        if line.strip():
            yield number, _json_object(path, number, _parse_json(path, f"row {number}", line))


def _read_json(path: Path) -> Iterator[NumberedRow]:
    rows = _parse_json(path, "the file", "".join(line for _, line in _lines(path)))
    if not isinstance(rows, list):
        raise DataError(f"data {path}", f"holds {_type(rows)}, not a list of objects")
    for number, row in enumerate(cast("list[Any]", rows), 1):
        yield number, _json_object(path, number, row)


def _parse_json(path: Path, what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"data {path}", f"{what} is not JSON: {error.msg} ({where})") from error
    except RecursionError as error:
        raise DataError(f"data {path}", f"{what} is nested too deeply") from error


def _json_object(path: Path, number: int, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"data {path}", f"row {number} is {_type(row)}, not an object with columns")
    return cast("dict[str, Any]", row)


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    number = 0
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"data {path}", f"two columns have the same name: {', '.join(header)}")
        for number, fields in enumerate((fields for fields in reader if fields), 1):
            if len(fields) != len(header):
                found = f"row {number} (line {reader.line_num}) has {len(fields)} fields, the header {len(header)}"
                raise DataError(f"data {path}", found)
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        found = f"row {number + 1} (line {reader.line_num}) is not CSV: {error}"
        raise DataError(f"data {path}", found) from error


def _read_parquet(path: Path) -> Iterator[NumberedRow]:
    # Half a second to import, and only Parquet files need it.
    import pyarrow as arrow  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"data {path}", f"not readable as Parquet after row {number}: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(source: str, split: str) -> Iterator[NumberedRow]:
    """Rows of the hub dataset `owner/name`, or of its subset `owner/name:subset`."""
    # Seconds to import, and only hub datasets need it: `onebase --help` must not wait for it.
    import datasets  # noqa: PLC0415

    name, _, subset = source.partition(":")
    tried = f"no such file here, and the hub dataset {name!r} (split {split!r}) could not be loaded"
    try:
        dataset = datasets.load_dataset(name, subset or None, split=split)
    except OSError as error:  # no network, offline, or no such dataset
        raise MissingFile(f"data {source}", f"{tried}: {error}") from error
    except (ValueError, RuntimeError) as error:  # unknown split or subset, or a dataset that needs a script
        hint = "choose a split with --split, a subset with --data owner/name:subset"
        raise DataError(f"data {source}", f"{tried}: {error}", hint=hint) from error
    return enumerate(cast("Iterable[Mapping[str, Any]]", dataset), 1)


# -- Columns: which of the file's columns are ours.


def _columns(source: str, found: Sequence[str], config: DataConfig, kinds: Sequence[Kind]) -> dict[str, str]:
    """Our column names of the one kind that the file holds -> the file's names for them."""
    renamed = config.map_columns
    for ours, theirs in renamed.items():
        if ours not in COLUMNS:
            raise ConfigError(f"option map={ours}={theirs}", f"no column {ours!r}", nearest(ours, COLUMNS))
        if theirs not in found:
            raise DataError(
                f"data {source}", f"has no column {theirs!r} (option map)", nearest(theirs, found)
            )
    available = {name: name for name in COLUMNS if name in found} | renamed
    for names in (KINDS[kind] for kind in kinds):
        if all(name in available for name in names) and renamed.keys() <= set(names):
            return {name: available[name] for name in names}
    hint = _map_hint(found, kinds)
    raise DataError(
        f"data {source}", f"has the columns {', '.join(found)}; needs one of: {_wanted(kinds)}", hint=hint
    )


def _map_hint(found: Sequence[str], kinds: Sequence[Kind]) -> str:
    """The first --map that makes a whole kind out of well-known names, or how to write one."""
    for names in (KINDS[kind] for kind in kinds):
        fits = {ours: next((n for n in (ours, *ALIASES[ours]) if n in found), None) for ours in names}
        if all(fits.values()):
            pairs = ",".join(f"{ours}={theirs}" for ours, theirs in fits.items() if ours != theirs)
            return f"this would fit: --map {pairs}"
    pairs = ",".join(f"{name}=COLUMN" for name in KINDS[_SHOWN.get(kinds[0], kinds[-1])])
    return f"say which column is which: --map {pairs}"


# The kind whose columns a hint spells out, by the first kind that would do; for others the last that would.
_SHOWN: dict[Kind, Kind] = {"messages": "completion"}


def _group_column(source: str, found: Sequence[str], columns: Mapping[str, str], config: DataConfig) -> str:
    name = config.split_by
    if not name or name in found:
        return name
    if name in columns:
        return columns[name]
    raise DataError(f"data {source}", f"has no column {name!r} (option split_by)", nearest(name, found))


# -- Values: what the columns of one row hold.


def _example(source: str, row: NumberedRow, columns: Mapping[str, str], group: str) -> Example:
    number, fields = row

    def fail(found: str) -> NoReturn:
        raise DataError(f"data {source}", f"row {number} {found}")

    for name in (*columns.values(), *([group] if group else [])):
        if name not in fields:
            near = nearest(name, fields)
            raise DataError(f"data {source}", f"row {number} has no column {name!r}", near)
        if fields[name] is None:
            fail(f"has null in column {name!r}")
    values = {ours: fields[theirs] for ours, theirs in columns.items()}
    label = str(fields[group]) if group else ""
    talk = "messages" in values or "prompt" in values
    if talk and all(isinstance(value, list) for value in values.values()):
        # One list of messages, or TRL's conversational prompt and completion: two parts of one chat.
        messages = list(itertools.chain(*values.values()))
        return Example(number, messages=_messages(messages, fail), group=label)
    for ours, value in values.items():
        if ours == "label":
            if not isinstance(value, Label):
                fail(f"has {_type(value)} in column {columns[ours]!r}, not a text, a number or true or false")
            continue
        wanted = "a list of messages" if ours == "messages" else "text"
        if ours == "messages" or not isinstance(value, str):
            fail(f"has {_type(value)} in column {columns[ours]!r}, not {wanted}")
        _check_text(value, f"column {columns[ours]!r}", fail)
    return Example(number, **values, group=label)


def _messages(items: Sequence[Any], fail: Callable[[str], NoReturn]) -> tuple[Message, ...]:
    if not items:
        fail("has an empty list of messages")
    for index, item in enumerate(items, 1):
        if not isinstance(item, dict):
            fail(f"has {_type(item)} as message {index}, not an object with role and content")
        message = cast("dict[str, Any]", item)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            fail(f"has the role {role!r} in message {index}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            fail(f"has {_type(content)} as content of message {index}, not text")
        if message.get("tool_calls"):
            fail(f"has tool calls in message {index}; write them into its content as the model should")
        _check_text(content, f"message {index}", fail)
    return tuple({"role": item["role"], "content": item["content"]} for item in items)


def _check_text(text: str, where: str, fail: Callable[[str], NoReturn]) -> None:
    """JSON can spell half of a surrogate pair (`\\ud83d`), which is no text and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fail(f"has half a surrogate pair in {where}, at character {error.start + 1}")


def _type(value: object) -> str:
    return TYPE_NAMES.get(type(value).__name__, type(value).__name__)
