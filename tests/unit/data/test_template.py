"""Rows to ids and loss: what carries loss, where rows begin and end, and prompts as they were taught."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onebase.config import DataConfig
from onebase.data.read import Example
from onebase.data.template import EncodedSet, PromptFormat, encode, render_messages, render_prompt
from onebase.errors import ConfigError, DataError


def turns(*contents: str, first: str = "user") -> tuple[dict[str, str], ...]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))


def stops(tokenizer) -> list[int]:
    return tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])


def run(tokenizer, *examples: Example, context: int = 10_000, stop_ids=None, **options) -> EncodedSet:
    ids = stops(tokenizer) if stop_ids is None else stop_ids
    return encode(tokenizer, examples, DataConfig(**options), ids, context)


def one(tokenizer, example: Example, **options):
    return run(tokenizer, example, **options).rows[0]


def spans(tokenizer, row) -> list[str]:
    """The texts of the row's runs of loss."""
    texts, run = [], []
    for token, carries in [*zip(row.ids, row.loss, strict=True), (None, False)]:
        if carries:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def prompt_part(row) -> list[int]:
    """The ids before the row's last run of loss."""
    last = max(index for index, carries in enumerate(row.loss) if carries)
    while row.loss[last - 1]:
        last -= 1
    return row.ids[:last]


# -- Prompt and completion.


def test_the_completion_and_the_end_carry_loss(gpt):
    row = one(gpt, Example(7, prompt="Is it true?", completion="yes, it is."))
    assert row.row == 7
    assert gpt.decode(row.ids) == "Is it true?\nyes, it is.</s>"
    assert spans(gpt, row) == ["yes, it is.</s>"]
    assert len(row.ids) == len(row.loss)


def test_an_end_is_not_added_twice_and_not_against_the_users_will(gpt):
    row = one(gpt, Example(1, prompt="a", completion="yes</s>"))
    assert spans(gpt, row) == ["yes</s>"]
    row = one(gpt, Example(1, prompt="a", completion="yes"), teach_eos=False)
    assert spans(gpt, row) == ["yes"]


def test_the_end_is_the_token_that_generation_stops_on(gpt):
    im_end = gpt.convert_tokens_to_ids("<|im_end|>")
    assert one(gpt, Example(1, text="a"), stop_ids=[im_end]).ids[-1] == im_end
    assert one(gpt, Example(1, text="a"), stop_ids=[im_end, gpt.eos_token_id]).ids[-1] == gpt.eos_token_id
    assert one(gpt, Example(1, text="a"), stop_ids=[]).ids[-1] == gpt.eos_token_id


def test_a_bos_comes_first_where_the_tokenizer_puts_one(gpt, spaced):
    example = Example(1, prompt="yes", completion="no")
    assert one(spaced, example).ids[:2].count(spaced.bos_token_id) == 1
    assert one(spaced, example).ids[0] == spaced.bos_token_id
    assert gpt.bos_token_id not in one(gpt, example).ids


def test_the_whole_text_is_tokenised_where_the_prompt_stays_whole(gpt, spaced):
    for tokenizer in (gpt, spaced):
        text = "Is it true?\nyes, it is."
        row = one(tokenizer, Example(1, prompt="Is it true?", completion="yes, it is."))
        assert row.ids[:-1] == tokenizer(text)["input_ids"]


def test_no_token_spans_the_prompts_end(gpt, spaced):
    """Tokenised whole, 'A: yes' has the token ' yes', which a prompt 'A: ' cannot start."""
    for tokenizer in (gpt, spaced):
        whole, prompt = tokenizer("A: yes")["input_ids"], tokenizer("A: ")["input_ids"]
        assert whole[: len(prompt)] != prompt, "the case under test"
        example = Example(1, prompt="A: ", completion="yes")
        row = one(tokenizer, example, separator="")
        # The pieces give the text back: no second space from a tokenizer that starts every text with one.
        assert tokenizer.decode(row.ids, skip_special_tokens=True) == "A: yes"
        assert spans(tokenizer, row) == ["yes</s>"]
        assert prompt_part(row) == prompt


def test_line_breaks_at_the_edge(spaced, gpt):
    for tokenizer in (gpt, spaced):
        row = one(tokenizer, Example(1, prompt="A:\n", completion="\nno"))
        assert tokenizer.decode(row.ids, skip_special_tokens=True) == "A:\n\n\nno"
        assert prompt_part(row) == tokenizer("A:\n\n")["input_ids"]


TEXT = st.text(st.sampled_from("ab :\n\té?🙂yesno"), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(TEXT, TEXT, st.sampled_from(["\n", "", " "]))
def test_a_prompt_is_asked_as_it_was_taught(gpt, prompt, completion, separator):
    example = Example(1, prompt=prompt, completion=completion)
    row = one(gpt, example, separator=separator)
    form = PromptFormat.of(DataConfig(separator=separator), [example])
    asked = render_prompt(gpt, prompt, form)
    assert asked == render_prompt(gpt, example, form) == row.ids[: len(asked)]
    assert gpt.decode(row.ids) == f"{prompt}{separator}{completion}</s>"
    assert row.loss == [index >= max(1, len(asked)) for index in range(len(row.ids))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.text("ab :\nyesno", max_size=12), st.text("ab :\nyesno", max_size=12), st.sampled_from(["\n", ""]))
def test_a_tokenizer_that_adds_spaces_adds_none_inside_a_row(spaced, prompt, completion, separator):
    example = Example(1, prompt=prompt, completion=completion)
    row = one(spaced, example, separator=separator)
    asked = render_prompt(spaced, prompt, PromptFormat(separator=separator))
    assert asked == row.ids[: len(asked)]
    assert spaced.decode(row.ids[1:-1]) == spaced.decode(
        spaced(prompt + separator + completion)["input_ids"][1:]
    )


# -- Text.


def test_text_rows_carry_loss_on_all_but_the_first_token(gpt, spaced):
    for tokenizer in (gpt, spaced):
        row = one(tokenizer, Example(1, text="yes, it is."))
        assert row.loss == [False] + [True] * (len(row.ids) - 1)
        assert row.ids[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="no prompt"):
        render_prompt(gpt, Example(1, text="a"), PromptFormat())
    assert PromptFormat.of(DataConfig(), [Example(1, text="a")]).separator == ""


def test_loss_on_all(gpt, chatml):
    row = one(gpt, Example(1, prompt="a b", completion="c"), loss_on="all")
    assert row.loss == [False] + [True] * (len(row.ids) - 1)
    row = one(chatml, Example(1, messages=turns("q", "a")), loss_on="all")
    assert row.loss == [False] + [True] * (len(row.ids) - 1)
    assert row.ids.count(chatml.eos_token_id) == 0, "the turn's own end is an end"


# -- Chats.


def test_each_assistant_turn_and_its_end_carry_loss(chatml):
    example = Example(1, messages=turns("is it?", "yes", "sure?", "no"))
    row = one(chatml, example)
    assert spans(chatml, row) == ["yes<|im_end|>", "no<|im_end|>"]
    whole = chatml.apply_chat_template(list(example.messages), tokenize=False)
    assert row.ids == chatml(whole)["input_ids"]
    assert row.ids[-1] == chatml("\n")["input_ids"][0]
    assert not row.loss[-1]
    assert render_prompt(chatml, example, PromptFormat(chat=True)) == prompt_part(row)


def test_prompt_and_completion_rendered_as_a_chat_with_a_system_message(chatml):
    example = Example(1, prompt="is it?", completion="yes")
    config = DataConfig(chat=True, system="answer")
    row = one(chatml, example, chat=True, system="answer")
    start = (
        "<|im_start|>system\nanswer<|im_end|>\n<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chatml.decode(row.ids) == start + "yes<|im_end|>\n"
    form = PromptFormat.of(config, [example])
    assert render_prompt(chatml, "is it?", form) == render_prompt(chatml, example, form) == prompt_part(row)
    assert chatml.decode(prompt_part(row)) == start


def test_a_row_keeps_its_own_system_message(chatml):
    own = ({"role": "system", "content": "own"}, *turns("q", "a"))
    text = chatml.decode(one(chatml, Example(1, messages=own), system="ours").ids)
    assert "own" in text
    assert "ours" not in text
    assert "ours" in chatml.decode(one(chatml, Example(1, messages=turns("q", "a")), system="ours").ids)


def test_a_chat_that_ends_with_the_user_is_not_ended(chatml):
    row = one(chatml, Example(1, messages=turns("q", "a", "more")))
    assert spans(chatml, row) == ["a<|im_end|>"]
    assert chatml.eos_token_id not in row.ids
    silent = one(chatml, Example(1, messages=turns("q")))
    assert not any(silent.loss)


def test_a_turn_without_a_stop_token_gets_an_end(chatml):
    row = one(chatml, Example(1, messages=turns("q", "a")), stop_ids=[chatml.eos_token_id])
    assert spans(chatml, row) == ["a<|im_end|>\n</s>"]


def test_the_bos_of_a_template_is_not_doubled(bos_chat):
    bos = bos_chat.bos_token_id
    example = Example(1, messages=turns("q", "a"))
    row = one(bos_chat, example)
    assert row.ids[0] == bos
    assert row.ids.count(bos) == 1
    assert render_prompt(bos_chat, example, PromptFormat(chat=True)) == prompt_part(row)
    plain = one(bos_chat, Example(1, prompt="q", completion="a"))
    assert plain.ids.count(bos) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(TEXT, min_size=1, max_size=3))
def test_chat_prompts_are_asked_as_they_were_taught(chatml, contents):
    messages = turns(*with_questions(contents))
    example = Example(1, messages=messages)
    row = one(chatml, example)
    asked = render_prompt(chatml, example, PromptFormat(chat=True))
    assert asked == row.ids[: len(asked)] == render_messages(chatml, messages[:-1], PromptFormat())
    assert chatml.decode(row.ids) == chatml.apply_chat_template(list(messages), tokenize=False)
    assert chatml.decode(
        [t for t, c in zip(row.ids[len(asked) :], row.loss[len(asked) :], strict=True) if c]
    ) == (messages[-1]["content"] + "<|im_end|>")


def with_questions(contents: list[str]) -> list[str]:
    return [text for content in contents for text in ("ask", content)]


def test_a_template_that_rewrites_history_leaves_turns_unmarked(forgetful):
    fine = Example(1, messages=turns("q", "a"))
    lost = Example(2, messages=turns("q", "a", "r", "b"))
    encoded = run(forgetful, fine, lost)
    assert encoded.unmarked == (2,)
    assert spans(forgetful, encoded.rows[0]) == ["a<|im_end|>"]
    text = "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert forgetful.decode(encoded.rows[1].ids) == text
    assert encoded.rows[1].loss == [False] + [True] * (len(encoded.rows[1].ids) - 2) + [False]
    assert run(forgetful, lost, loss_on="all").unmarked == ()


def test_generation_tags_mark_what_prefixes_cannot(tagged):
    encoded = run(tagged, Example(1, messages=turns("q", "a", "r", "b")))
    assert encoded.unmarked == ()
    assert spans(tagged, encoded.rows[0]) == ["b<|im_end|>"], "the end stands outside the tags, and is taught"
    assert encoded.rows[0].ids.count(tagged.eos_token_id) == 0


def test_a_chat_that_begins_with_the_assistant_is_unmarked(chatml):
    example = Example(3, messages=turns("hi", "q", "a", first="assistant"))
    assert run(chatml, example).unmarked == (3,)
    with pytest.raises(DataError, match="no message before"):
        render_prompt(chatml, Example(1, messages=turns("hi", first="assistant")), PromptFormat(chat=True))


def test_template_errors(gpt, strict):
    with pytest.raises(DataError, match="no chat template"):
        run(gpt, Example(1, messages=turns("q", "a")))
    with pytest.raises(DataError, match="no chat template"):
        render_prompt(gpt, "q", PromptFormat(chat=True))
    with pytest.raises(DataError, match=r"row 5.*no tools here"):
        run(strict, Example(5, messages=(*turns("q", "a"), {"role": "tool", "content": "x"})))


# -- Options.


def test_options_that_contradict_the_rows():
    with pytest.raises(ConfigError, match="option chat"):
        PromptFormat.of(DataConfig(chat=True), [Example(1, text="a")])
    with pytest.raises(ConfigError, match="option system"):
        PromptFormat.of(DataConfig(system="s"), [Example(1, prompt="a", completion="b")])


def test_no_rows_are_no_error(chatml):
    for overlong in ("error", "truncate", "drop"):
        assert run(chatml, system="s", overlong=overlong) == EncodedSet([])


def test_the_format_survives_json():
    form = PromptFormat.of(DataConfig(system="s"), [Example(1, messages=turns("q", "a"))])
    assert form == PromptFormat(chat=True, system="s", separator="")
    assert PromptFormat.from_dict(json.loads(json.dumps(form.as_dict()))) == form


def test_overlong_rows(gpt):
    short, long = Example(1, prompt="a", completion="b"), Example(2, prompt="a", completion="x" * 50)
    with pytest.raises(
        DataError, match=r"longer than 10 tokens: 1 of 2 rows; the longest, row 2, has \d+"
    ) as error:
        run(gpt, short, long, max_length=10)
    assert "--overlong truncate" in str(error.value)
    assert "--overlong drop" in str(error.value)

    cut = run(gpt, short, long, max_length=10, overlong="truncate")
    whole = one(gpt, long)
    assert [len(row.ids) for row in cut.rows] == [4, 10]
    assert (cut.rows[1].ids, cut.rows[1].loss) == (whole.ids[:10], whole.loss[:10])
    assert cut.truncated == (2,)
    assert cut.dropped == ()

    left = run(gpt, short, long, context=10, overlong="drop")
    assert [row.row for row in left.rows] == [1]
    assert left.dropped == (2,)
    with pytest.raises(DataError, match="every row"):
        run(gpt, long, context=10, overlong="drop")
    with pytest.raises(ConfigError, match="max_length=11"):
        run(gpt, short, context=10, max_length=11)


# -- Work that is not done twice.


class Counting:
    """A tokenizer that remembers the texts it was asked for."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        self.asked += [text] if isinstance(text, str) else text
        return self.tokenizer(text, **options)


def test_a_prompt_that_rows_share_is_tokenised_once(gpt):
    counting = Counting(gpt)
    rows = [Example(n, prompt="Is it true?", completion=text) for n, text in enumerate(("yes", "no", "yes"))]
    found = run(counting, *rows)
    assert sorted(counting.asked) == sorted({"a", "Is it true?\n", "Is it true?\nyes", "Is it true?\nno"})
    assert found.rows == [one(gpt, row) for row in rows]
    assert found.rows[0].ids is not found.rows[2].ids  # each row's tokens are its own
