"""An Ollama Modelfile for an adapter: its base, the adapter, and a template that renders what training rendered.

Ollama's templates are Go's, a tokenizer's are Jinja's. What a chat template does is found by rendering chats with it:
where it only puts fixed text around each turn, a Go template of that text does the same. Others are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from onebase.data.template import PromptFormat, Tokenizer
from onebase.errors import ConfigError

SYSTEM, USER, ANSWER = "<one-system>", "<one-user>", "<one-answer>"
_CONTENTS = {"system": SYSTEM, "user": USER, "assistant": ANSWER}
# What is rendered to check the pieces: chats of one, two and three questions, then the same after a system message.
CHATS = [[*itertools.chain.from_iterable([("user", "assistant")] * turns), "user"] for turns in range(3)]
SYSTEM_CHATS = [["system", *roles] for roles in CHATS]


_LINE = ('"', "\n", "\r")  # what a value on a line of its own cannot hold


class Pieces(NamedTuple):
    """The fixed text around the turns of a chat."""

    opening: str  # where there is no system message
    system: tuple[str, str] | None  # before and after a system message; None where the template takes none
    before_user: str
    before_answer: str
    after_answer: str
    ask: str  # after the last question, for the model to go on


def pieces_of(tokenizer: Tokenizer) -> Pieces | None:
    """The text that the tokenizer's chat template puts around turns; None where it does more than that."""
    if "strftime_now" in str(tokenizer.chat_template):  # it writes the date
        return None
    plain, with_system = _rendered(tokenizer, CHATS), _rendered(tokenizer, SYSTEM_CHATS)
    if not plain:
        return None
    pieces = _pieces([_between(text) for text in plain], _between(with_system[0]) if with_system else None)
    wanted = dict(zip(map(tuple, CHATS + SYSTEM_CHATS), plain + with_system, strict=False))
    if pieces is None or any(put_together(pieces, roles) != text for roles, text in wanted.items()):
        return None
    texts = [pieces.opening, *(pieces.system or ()), *pieces[2:]]
    return None if any("{{" in text or '"""' in text for text in texts) else pieces


def _pieces(plain: Sequence[list[str]], with_system: list[str] | None) -> Pieces | None:
    if len(plain[0]) != 2 or len(plain[1]) != 4 or (with_system and len(with_system) != 3):
        return None
    starts = [plain[0][0], plain[1][2], *(with_system[1:2] if with_system else ())]
    before_user = _common_end(*starts)
    opening, after_answer, *after_system = (text.removesuffix(before_user) for text in starts)
    system = (with_system[0], after_system[0]) if with_system else None
    return Pieces(opening, system, before_user, plain[1][1], after_answer, plain[0][1])


def _rendered(tokenizer: Any, chats: Sequence[Sequence[str]]) -> list[str]:
    """Chats as text, without the beginning-of-text token where Ollama adds that itself; none if one is refused."""
    texts: list[str] = []
    for roles in chats:
        messages = [{"role": role, "content": _CONTENTS[role]} for role in roles]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, KeyError):  # templates refuse chats in their own ways
            return []
        adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        texts.append(text.removeprefix(tokenizer.bos_token) if adds else text)
    return texts


def _between(text: str) -> list[str]:
    """What is left of a rendered chat when the contents of its messages are cut out."""
    for content in _CONTENTS.values():
        text = text.replace(content, "\0")
    return text.split("\0")


def _common_end(*texts: str) -> str:
    shared = itertools.takewhile(
        lambda letters: len(set(letters)) == 1, zip(*map(reversed, texts), strict=False)
    )
    return "".join(letters[0] for letters in shared)[::-1]


def put_together(pieces: Pieces, roles: Sequence[str]) -> str:
    """The chat that the pieces make, its last message a question: what `go_template` renders."""
    turns = {
        "user": pieces.before_user + USER + pieces.before_answer,
        "assistant": ANSWER + pieces.after_answer,
        "system": "",
    }
    opening = SYSTEM.join(pieces.system) if pieces.system and "system" in roles else pieces.opening
    return opening + "".join(turns[role] for role in roles[:-1]) + pieces.before_user + USER + pieces.ask


def go_template(pieces: Pieces) -> str:
    """The pieces as a template of Ollama's. An answer that is the last message is left open, to be gone on with."""
    head = pieces.opening
    if pieces.system:
        head = f"{{{{ if .System }}}}{'{{ .System }}'.join(pieces.system)}{{{{ else }}}}{head}{{{{ end }}}}"
    asked = f"{{{{ if $last }}}}{pieces.ask}{{{{ else }}}}{pieces.before_answer}{{{{ end }}}}"
    user = f"{pieces.before_user}{{{{ .Content }}}}{asked}"
    answer = f"{{{{ .Content }}}}{{{{ if not $last }}}}{pieces.after_answer}{{{{ end }}}}"
    turn = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
    last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    return f"{head}{{{{ range $i, $_ := .Messages }}}}{last}{turn}{{{{ end }}}}"


def modelfile(
    base: str, adapter: str, form: PromptFormat, tokenizer: Tokenizer | None, stops: Sequence[str]
) -> str:
    """The Modelfile's text: FROM `base`, ADAPTER `adapter`, and the prompt format that the adapter was trained with.

    `stops` end an answer. A chat template that does more than put text around turns is left out, with a comment.
    Raises ConfigError for a text that a Modelfile cannot hold.
    """
    for text, forbidden in [
        (form.system, ('"""',)),
        (form.separator, ('"""', "{{")),
        *((t, _LINE) for t in (base, *stops)),
    ]:
        if any(letters in text for letters in forbidden):
            raise ConfigError("write a Modelfile", f"{text!r} cannot stand in one")
    lines = ["# FROM: the base as Ollama knows it; it must be the very model that the adapter was trained on"]
    lines += [f"FROM {base}", f"ADAPTER {adapter}"]
    pieces = pieces_of(tokenizer) if form.chat and tokenizer and tokenizer.chat_template else None
    if not form.chat:
        lines.append(_quoted("TEMPLATE", f"{{{{ .Prompt }}}}{form.separator}"))
    elif pieces:
        lines.append(_quoted("TEMPLATE", go_template(pieces)))
    else:
        lines.append("# The base's chat template cannot be rewritten for Ollama; that of FROM is used.")
        lines.append("# Compare the two: the adapter was trained on the base's own.")
    if form.system:
        lines.append(_quoted("SYSTEM", form.system))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _quoted(name: str, text: str) -> str:
    return f'{name} """{text}"""'
