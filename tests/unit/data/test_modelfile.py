"""Ollama Modelfiles: chat templates rewritten as Go templates where that is exact, and left out where it is not."""

import re

import pytest

from onebase.data.modelfile import CHATS, SYSTEM_CHATS, go_template, modelfile, pieces_of
from onebase.data.template import PromptFormat
from onebase.errors import ConfigError
from texts import CHATML, tokenizer

TURN = "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
TEMPLATES = {
    "chatml": CHATML,
    "default system": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe nice.<|im_end|>\n' }}"
    "{% endif %}" + CHATML,
    "begins": "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}" + ASK,
    "no system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "roles renamed": "{% for m in messages %}{% set r = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start>' + r + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}",
    "system inside the question": "{% set s = messages[0]['content'] + '|' if messages[0]['role'] == 'system' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ 'U: ' + (s if s and loop.index0 == 1 else '') + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '\nA: ' + m['content'] + '\n' }}{% endif %}{% endfor %}{{ '\nA: ' }}",
}
REFUSED = {
    "numbered turns": "{% for m in messages %}{{ loop.index|string + m['content'] }}{% endfor %}",
    "the date": "{{ strftime_now('%d') }}" + CHATML,
    "contents twice": "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
    "only the last turn": "{{ messages[-1]['content'] }}",
    "what Go would take as code": CHATML.replace("<|im_end|>", "{{ '{{' }}"),
    "nothing at all": "{{ raise_exception('never') }}",
}


def with_template(text):
    words = tokenizer().__class__(
        tokenizer_object=tokenizer().backend_tokenizer, **tokenizer().special_tokens_map
    )
    words.chat_template = text
    return words


def go(template, roles, contents):
    """A reading of the few forms of Go's templates that are written here, for these messages."""
    head, turns = template.split("{{ range $i, $_ := .Messages }}")
    system = contents[roles.index("system")] if "system" in roles else ""
    if "{{ if .System }}" in head:
        given, _, plain = (
            head.removeprefix("{{ if .System }}").removesuffix("{{ end }}").partition("{{ else }}")
        )
        head = given if system else plain
    text = head.replace("{{ .System }}", system)
    form = r"{{ \$last := .*? }}{{ if eq .Role .user. }}(.*){{ else if eq .Role .assistant. }}(.*){{ end }}{{ end }}"
    user, answer = re.fullmatch(form, turns, re.DOTALL).groups()
    question, asked = user.split("{{ if $last }}")
    ask, _, answering = asked.removesuffix("{{ end }}").partition("{{ else }}")
    before, after = answer.split("{{ if not $last }}")
    for number, (role, content) in enumerate(zip(roles, contents, strict=True)):
        last = number == len(roles) - 1
        if role == "user":
            text += question.replace("{{ .Content }}", content) + (ask if last else answering)
        elif role == "assistant":
            text += before.replace("{{ .Content }}", content) + (
                "" if last else after.removesuffix("{{ end }}")
            )
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_template_renders_what_the_chat_template_does(name):
    words = with_template(TEMPLATES[name])
    pieces = pieces_of(words)
    assert pieces is not None
    assert (pieces.system is None) == (name == "no system")
    for roles in [*CHATS, *([] if pieces.system is None else SYSTEM_CHATS)]:
        contents = [f"text {n}\nof {role}" for n, role in enumerate(roles)]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        wanted = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert go(go_template(pieces), roles, contents) == wanted


def test_an_answer_that_comes_last_is_left_open():
    template = go_template(pieces_of(with_template(CHATML)))
    text = go(template, ["user", "assistant"], ["Hi", "Hel"])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHel"


def test_a_token_that_the_tokenizer_puts_first_is_left_to_ollama():
    class Beginning:
        chat_template, bos_token, bos_token_id = "x", "<s>", 1

        def __init__(self, adds):
            self.adds = adds

        def __call__(self, text):
            return {"input_ids": [1, 7] if self.adds else [7]}

        def apply_chat_template(self, messages, **_):
            return "<s>" + "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"

    assert pieces_of(Beginning(True)).before_user == "[user]"
    assert pieces_of(Beginning(False)).opening + pieces_of(Beginning(False)).before_user == "<s>[user]"


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_does_more_is_left_out(name):
    words = with_template(REFUSED[name])
    assert pieces_of(words) is None
    text = modelfile("base", "./a.gguf", PromptFormat(chat=True), words, [])
    assert "TEMPLATE" not in text
    assert "cannot be rewritten for Ollama" in text


def test_the_file():
    text = modelfile(
        "llama3.2:1b", "./a.gguf", PromptFormat(True, "Be kind."), with_template(CHATML), ["<|im_end|>"]
    )
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines[:2] == ["FROM llama3.2:1b", "ADAPTER ./a.gguf"]
    assert lines[-2:] == ['SYSTEM """Be kind."""', 'PARAMETER stop "<|im_end|>"']
    assert f'TEMPLATE """{go_template(pieces_of(with_template(CHATML)))}"""' in text
    plain = modelfile("b", "./a.gguf", PromptFormat(separator="\n-> "), None, [])
    assert 'TEMPLATE """{{ .Prompt }}\n-> """\n' in plain


@pytest.mark.parametrize(
    ("base", "form", "stops"),
    [
        ("b\nSYSTEM evil", PromptFormat(), []),
        ("b", PromptFormat(True, 'say """'), []),
        ("b", PromptFormat(separator="{{ .System }}"), []),
        ("b", PromptFormat(), ['"quoted"']),
    ],
)
def test_texts_that_would_be_instructions_are_refused(base, form, stops):
    with pytest.raises(ConfigError, match="cannot stand in one"):
        modelfile(base, "./a.gguf", form, with_template(CHATML), stops)
