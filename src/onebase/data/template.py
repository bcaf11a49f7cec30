"""Rows to token ids, each with the mask of the tokens that carry loss; and the prompt a generation starts from.

A row is built in stages: the text up to the end of the prompt, up to the end of the answer, and so on. Its
training ids and the prompt's ids come from the same code, so that a model is asked exactly as it was taught.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError

from onebase.config import DataConfig
from onebase.data.read import Example, Message
from onebase.errors import ConfigError, DataError, FormatError


class Tokenizer(Protocol):
    """What this package uses of a Hugging Face tokenizer, fast or slow."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def chat_template(self) -> Any: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...
    @property
    def all_special_ids(self) -> Sequence[int]: ...

    def __call__(self, text: Any, **options: Any) -> Any: ...
    def decode(self, token_ids: Any, **options: Any) -> Any: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def get_chat_template(self) -> str: ...


class Encoded(NamedTuple):
    """One row: `ids`, and for each of them whether it is a target that carries loss (the first never is).

    A labelled row has one target instead: `label` is its class's number, or the number itself. `types` are the token
    types (of the first text, of the second) where they are not all 0. `parts` are the lengths of the texts that stand
    end to end in a row of anchor, positive and maybe negative, whose one target is to find the positive.
    """

    row: int
    ids: list[int]
    loss: list[bool]
    truncated: bool = False
    label: float | None = None
    types: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()

    @property
    def targets(self) -> int:
        """How many targets the row has."""
        return sum(self.loss[1:]) if self.label is None and not self.parts else 1

    def without_targets(self) -> Encoded:
        """The same tokens, to go through a model and count for nothing."""
        return self._replace(loss=[False] * len(self.ids), label=None)

    def without_end(self, limit: int) -> Encoded:
        """The first `limit` tokens."""
        return self._replace(ids=self.ids[:limit], loss=self.loss[:limit], truncated=True)


@dataclass(frozen=True)
class EncodedSet:
    """Encoded rows, with the numbers of those left out as too long and those whose turns could not be told."""

    rows: list[Encoded]
    dropped: tuple[int, ...] = ()
    unmarked: tuple[int, ...] = ()

    @property
    def truncated(self) -> tuple[int, ...]:
        """Numbers of the rows whose end was cut off."""
        return tuple(row.row for row in self.rows if row.truncated)


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt becomes the start of a row; stored with the adapter, so that generation does the same."""

    chat: bool = False
    system: str = ""
    separator: str = ""

    @classmethod
    def of(cls, config: DataConfig, examples: Sequence[Example]) -> PromptFormat:
        """The format that `config` asks for and the kind of `examples` needs."""
        kinds = {example.kind for example in examples}
        if config.chat and "text" in kinds:
            raise ConfigError("option chat", "text rows have no prompt to render; use prompt and completion")
        chat = config.chat or "messages" in kinds
        if config.system and examples and not chat:
            raise ConfigError("option system", "needs messages rows, or prompt and completion with --chat")
        plain = not chat and "text" not in kinds
        return cls(chat, config.system, config.separator if plain else "")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: `from_dict(f.as_dict()) == f`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptFormat:
        """The inverse of `as_dict`; a FormatError for anything else, since it is read from a file."""
        known = {item.name: type(item.default) for item in dataclasses.fields(cls)}
        if any(not isinstance(value, known.get(name, ())) for name, value in values.items()):
            raise FormatError(
                "prompt format", f"{dict(values)!r} is not one", hint=f"it has {', '.join(known)}"
            )
        return cls(**values)


Cut = Callable[[Encoded, int], Encoded]  # (a row, the longest length) -> the row with as many tokens


class Stage(NamedTuple):
    """The row's text from its start to the end of this stage; what the stage adds carries loss or not."""

    text: str
    loss: bool


class Piece(NamedTuple):
    """Consecutive tokens of a row that all carry loss, or all do not."""

    ids: list[int]
    loss: bool


class Plan(NamedTuple):
    """A row before tokenisation: its stages, or the pieces that the template's own mask gave."""

    stages: list[Stage]
    pieces: list[Piece]
    chat: bool
    finished: bool  # the row ends in an answer, so an end-of-text token belongs there
    marked: bool = True


class Ends(NamedTuple):
    """The ids on which generation stops, and the one that is put at the end of a row (None: none)."""

    stops: frozenset[int]
    appended: int | None


def encode(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    config: DataConfig,
    stop_ids: Sequence[int],
    context: int,
) -> EncodedSet:
    """Token ids and loss mask of every row, in order.

    `stop_ids` are the ids on which generation stops; `context` is the longest row the base takes, in tokens.
    Raises DataError for a chat without a template and, with overlong=error, for rows that are too long.
    """
    form = PromptFormat.of(config, examples)
    ends = Ends(frozenset(stop_ids), _end_token(tokenizer, stop_ids) if config.teach_eos else None)
    plans = [_plan(tokenizer, example, form, ends) for example in examples]
    tokens = iter(_tokenise(tokenizer, [stage.text for plan in plans for stage in plan.stages]))
    lead = _lead(tokenizer)
    rows: list[Encoded] = []
    for example, plan in zip(examples, plans, strict=True):
        stages = list(itertools.islice(tokens, len(plan.stages)))
        pieces = plan.pieces or _pieces(tokenizer, plan.stages, stages)
        start = [] if plan.chat else [Piece(lead, False)]
        ids, loss = _finish(tokenizer, [*start, *pieces], plan, ends)
        carries = [True] * len(loss) if config.loss_on == "all" else loss
        rows.append(Encoded(example.row, ids, [False, *carries[1:]][: len(ids)]))
    unmarked = [e.row for e, plan in zip(examples, plans, strict=True) if not plan.marked]
    told = tuple(unmarked) if config.loss_on == "completion" else ()
    return fit(EncodedSet(rows, (), told), config, context)


def render_prompt(tokenizer: Tokenizer, prompt: Example | str, form: PromptFormat) -> list[int]:
    """The ids from which a generation starts: exactly the ids before the (last) answer in the training row.

    A str is one user's prompt. An Example of messages is cut before its last message if the assistant wrote
    that. Raises DataError for a text row: it has no prompt.
    """
    if form.chat or (isinstance(prompt, Example) and prompt.kind == "messages"):
        where = "prompt" if isinstance(prompt, str) else f"row {prompt.row}"
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _chat(prompt)
        return render_messages(tokenizer, messages, form, where)
    text = prompt if isinstance(prompt, str) else prompt.prompt
    if text is None:
        raise DataError("prompt", "a text row has no prompt; give one as text")
    return _lead(tokenizer) + _tokenise(tokenizer, [text + form.separator])[0]


def render_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], form: PromptFormat, where: str = "messages"
) -> list[int]:
    """`render_prompt` of a chat; `where` names it in errors."""
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    chat = _with_system(messages[:-1] if answered else messages, form)
    if not chat:
        raise DataError(where, "has no message before the assistant's")
    stages = _chat_stages(tokenizer, chat, True, where) or [
        Stage(_render(tokenizer, chat, True, where), False)
    ]
    tokens = _tokenise(tokenizer, [stage.text for stage in stages])
    return list(itertools.chain(*(piece.ids for piece in _pieces(tokenizer, stages, tokens))))


# -- Text: the stages of a row.


def _plan(tokenizer: Tokenizer, example: Example, form: PromptFormat, ends: Ends) -> Plan:
    if example.text is not None:
        return Plan([Stage(example.text, True)], [], False, True)
    if not form.chat:
        prompt = f"{example.prompt}{form.separator}"
        return Plan([Stage(prompt, False), Stage(f"{prompt}{example.completion}", True)], [], False, True)
    where = f"row {example.row}"
    messages = _with_system(_chat(example), form)
    finished = messages[-1]["role"] == "assistant"
    stages = _chat_stages(tokenizer, messages, False, where)
    if stages is not None:
        return Plan(stages, [], True, finished)
    masked = _template_mask(tokenizer, messages, ends)
    whole = [] if masked else [Stage(_render(tokenizer, messages, False, where), True)]
    return Plan(whole, masked, True, finished, bool(masked))


def _chat(example: Example) -> list[Message]:
    if example.messages is not None:
        return list(example.messages)
    if example.prompt is None or example.completion is None:
        raise DataError(f"row {example.row}", "a text row has no prompt; give one as text")
    return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]


def _with_system(messages: Sequence[Message], form: PromptFormat) -> list[Message]:
    if not form.system or (messages and messages[0]["role"] in ("system", "developer")):
        return list(messages)
    return [{"role": "system", "content": form.system}, *messages]


def _chat_stages(
    tokenizer: Tokenizer, messages: Sequence[Message], generate: bool, where: str
) -> list[Stage] | None:
    """Stages that end before and after each assistant turn; None where the template rewrites earlier text.

    A turn is what the template adds to its own generation prompt, so that exactly what a model has to write
    carries loss. That needs each shorter chat to be a prefix of the longer one.
    """
    full = _render(tokenizer, messages, generate, where)
    stages: list[Stage] = []
    for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        if index == 0:
            return None
        last = index + 1 == len(messages) and not generate
        after = full if last else _render(tokenizer, messages[: index + 1], False, where)
        stages += [Stage(_render(tokenizer, messages[:index], True, where), False), Stage(after, True)]
    if not stages or stages[-1].text != full:
        stages.append(Stage(full, False))
    nested = all(longer.text.startswith(shorter.text) for shorter, longer in itertools.pairwise(stages))
    return stages if nested else None


def _render(tokenizer: Tokenizer, messages: Sequence[Message], generate: bool, where: str) -> str:
    if not tokenizer.chat_template:
        hint = "use prompt and completion without --chat, or an instruct base"
        raise DataError("chat rows", "this base's tokenizer has no chat template", hint=hint)
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        raise DataError(where, f"the base's chat template refuses it: {error.message}") from error


def _template_mask(tokenizer: Tokenizer, messages: Sequence[Message], ends: Ends) -> list[Piece]:
    """Pieces from the template's own {% generation %} tags; empty if it has none."""
    if not re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        return []
    coded = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, loss = coded["input_ids"], [bool(carries) for carries in coded["assistant_masks"]]
    for index in range(1, len(ids)):
        # Tags are often put around the content alone; without its end the turn would never end.
        loss[index] = loss[index] or (loss[index - 1] and ids[index] in ends.stops)
    runs = itertools.groupby(zip(ids, loss, strict=True), key=lambda token: token[1])
    return [Piece([token for token, _ in run], carries) for carries, run in runs] if any(loss) else []


# -- Tokens: from stages to ids.


def _tokenise(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    # Never with the tokenizer's own special tokens: _lead and _finish add ours, a chat template writes its own.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    once = list(dict.fromkeys(texts))  # rows often share their prompt
    ids = dict(zip(once, tokenizer(once, **options)["input_ids"] if once else [], strict=True))
    return [ids[text] for text in texts]


def _lead(tokenizer: Tokenizer) -> list[int]:
    """The beginning-of-text id, if this tokenizer puts one before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


def _end_token(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> int:
    """The tokenizer's end-of-text id if generation stops on it, else the first id on which it does."""
    own = tokenizer.eos_token_id
    if own is not None and (own in stop_ids or not stop_ids):
        return own
    if not stop_ids:
        hint = "train without one: --teach_eos false"
        raise DataError("option teach_eos", "this base has no end-of-text token", hint=hint)
    return stop_ids[0]


def _pieces(tokenizer: Tokenizer, stages: Sequence[Stage], tokens: Sequence[list[int]]) -> list[Piece]:
    """Split a row's ids at the ends of its stages; `tokens` are the ids of each stage's whole text.

    Tokenising the whole text is what the base saw in pre-training, but a token may span the end of the
    prompt ("A: " + "yes" -> " yes"). A generation cannot start inside a token, so the ids of a stage must
    begin with those of the one before; where they do not, what the stage adds is tokenised apart.
    """
    pieces: list[Piece] = []
    ids: list[int] = []
    done = ""
    for stage, whole in zip(stages, tokens, strict=True):
        begins = whole[: len(ids)] == ids
        added = whole[len(ids) :] if begins else _apart(tokenizer, stage.text[len(done) :])
        pieces.append(Piece(added, stage.loss))
        ids, done = ids + added, stage.text
    return pieces


def _apart(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that stands in the middle of another.

    SentencePiece-like tokenizers put a space before whatever they are given. Behind another text they do
    not, so the ids are taken from there, where that text's own ids stay whole.
    """
    for before in ("\n", ":"):
        start, whole = _tokenise(tokenizer, [before, before + text])
        if whole[: len(start)] == start:
            return whole[len(start) :]
    return _tokenise(tokenizer, [text])[0]


def _finish(
    tokenizer: Tokenizer, pieces: Sequence[Piece], plan: Plan, ends: Ends
) -> tuple[list[int], list[bool]]:
    """Join the pieces; loss ends at a turn's stop token, and an unended row gets an end-of-text token."""
    ids: list[int] = []
    loss: list[bool] = []
    for piece in pieces:
        count = len(piece.ids)
        if plan.chat and piece.loss:
            count = _through_stop(tokenizer, piece.ids, ends.stops)
        ids += piece.ids
        loss += [piece.loss] * count + [False] * (len(piece.ids) - count)
    last = next(itertools.compress(reversed(ids), reversed(loss)), None)
    if ends.appended is not None and plan.finished and last not in {*ends.stops, ends.appended}:
        return [*ids, ends.appended], [*loss, True]
    return ids, loss


def _through_stop(tokenizer: Tokenizer, ids: Sequence[int], stops: frozenset[int]) -> int:
    """How many tokens of a turn carry loss: not the line break that a template puts behind the stop token."""
    end = next((index + 1 for index in reversed(range(len(ids))) if ids[index] in stops), len(ids))
    return len(ids) if tokenizer.decode(ids[end:]).strip() else end


def fit(encoded: EncodedSet, config: DataConfig, context: int, cut: Cut = Encoded.without_end) -> EncodedSet:
    """The rows within the longest length: what is longer is refused (DataError), left out, or made shorter by `cut`."""
    rows, unmarked = encoded.rows, encoded.unmarked
    if config.max_length > context:
        raise ConfigError(f"option max_length={config.max_length}", f"the base takes {context} at most")
    limit = config.max_length or context
    long = [row for row in rows if len(row.ids) > limit]
    if long and config.overlong == "error":
        longest = max(long, key=lambda row: len(row.ids))
        found = f"{len(long)} of {len(rows)} rows; the longest, row {longest.row}, has {len(longest.ids)}"
        hint = "cut their end with --overlong truncate, or leave them out with --overlong drop"
        raise DataError(f"rows longer than {limit} tokens", found, hint=hint)
    if config.overlong == "drop":
        kept = [row for row in rows if len(row.ids) <= limit]
        if rows and not kept:
            raise DataError("option overlong=drop", f"every row is longer than {limit} tokens")
        left = {row.row for row in kept}
        return EncodedSet(kept, tuple(row.row for row in long), tuple(r for r in unmarked if r in left))
    return EncodedSet([cut(row, limit) if len(row.ids) > limit else row for row in rows], (), unmarked)
