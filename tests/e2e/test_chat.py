"""`onebase chat`, typed into: whose answers come, what is remembered, and what Ctrl-C ends."""

import io
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from onebase.cli.main import main
from onebase.serve.engine import Engine
from texts import QUESTIONS, save_base

SHORT = ["--max-new-tokens", "5", "--dtype", "float32"]
QUESTION = QUESTIONS[0]["prompt"]


@pytest.fixture
def talk(monkeypatch, capsys):
    """Types lines into a conversation; gives (what was answered, notes)."""

    def typed(*lines, flags=(), short=SHORT):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert main(["chat", *flags, *short]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return typed


@pytest.fixture
def generated(capsys):
    """What `onebase generate` answers; a conversation leaves out the character that was cut off at the end."""

    def asked(prompt, *flags, short=SHORT):
        capsys.readouterr()
        assert main(["generate", *flags, "--prompt", prompt, *short]) == 0
        return capsys.readouterr().out[:-1].rstrip("\N{REPLACEMENT CHARACTER}")

    return asked


@pytest.fixture(scope="module")
def others(place, tmp_path_factory):
    """The run's adapter under two more paths, one of them with the run's own name."""
    folder = tmp_path_factory.mktemp("others")
    for name in ("second", "run"):
        (folder / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors", "onebase.json"):
            shutil.copy(Path(place.run) / file, folder / name)
    return folder


def test_answers_are_those_of_generate_and_adapters_switch(place, talk, generated):
    lines = (QUESTION, "/base", "/reset", QUESTION, "/adapter", "/reset", "", QUESTION, "/quit", "never read")
    said, notes = talk(*lines, flags=["--adapter", place.run])
    tuned, plain = generated(QUESTION, "--adapter", place.run), generated(QUESTION, "--base", place.base)
    assert said == f"{tuned}\n{plain}\n{tuned}\n"
    assert tuned != plain
    assert f"plain base {place.base} answers" in notes.replace("\n", "")
    assert notes.count("adapter run answers") == 2


def test_the_conversation_goes_on_when_the_adapter_changes(place, talk):
    """Another adapter's answer to the second line depends on the first one; after a reset it does not."""
    first, second = "What is it?", "And then?"
    flags = ["--adapter", place.run]
    after, _ = talk(first, "/base", second, flags=flags)
    fresh, _ = talk("/base", second, flags=flags)
    forgot, _ = talk(first, "/base", "/reset", second, flags=flags)
    assert after.split("\n")[-2] != fresh.split("\n")[-2] == forgot.split("\n")[-2]


def test_several_adapters_by_name_and_one_loaded_on_the_fly(place, others, talk, generated):
    lines = ("/adapters", "/adapter second", QUESTION, f"/adapter {others / 'run'}", "/adapters")
    said, notes = talk(*lines, flags=["--adapter", f"{place.run},{others / 'second'}"])
    assert said == generated(QUESTION, "--adapter", place.run) + "\n"
    listed = [line.split()[:2] for line in notes.splitlines() if line.startswith(("* ", "  "))]
    assert ["*", "run"] in listed
    assert ["*", "run-2"] in listed  # the name was taken
    assert "adapter run-2 answers" in notes


def test_what_cannot_be_chosen_is_said_and_changes_nothing(place, others, talk, generated):
    flags = ["--adapter", f"{place.run},{others / 'second'}"]
    said, notes = talk("/adapter secnd", "/adapter", f"/adapter {place.base}", "/loud", QUESTION, flags=flags)
    assert said == generated(QUESTION, "--adapter", place.run) + "\n"
    assert "no adapter of that name" in notes
    assert "second" in notes
    assert "there are several" in notes
    assert "/loud: no such command" in notes
    assert "/reset" in notes


def test_a_long_message_is_left_out(place, talk, generated):
    said, notes = talk("/adapter", "long " * 200, "Hi", flags=["--base", place.base])
    assert "no adapter was given" in notes
    assert "that message was left out" in notes
    assert said == generated("Hi", "--base", place.base) + "\n"


def test_an_adapter_of_another_base_is_refused_before_anything_is_said(place, talk, tmp_path, capsys):
    flags = ["--base", str(save_base(tmp_path / "other", seed=1)), "--adapter", place.run]
    assert main(["chat", *flags, *SHORT]) == 2
    assert "does not fit this base" in capsys.readouterr().err
    said, _ = talk("Hi", flags=[*flags, "--allow-base-mismatch"])
    assert said


def test_ctrl_c_ends_the_answer_and_not_the_session(place, talk, generated, monkeypatch):
    long = ["--max-new-tokens", "60", "--dtype", "float32"]
    whole = generated(QUESTION, "--base", place.base, short=long)
    step, shown = Engine.step, []

    def slow_step(self):
        time.sleep(0.02)  # else the answer is over before the key is pressed
        return step(self)

    def interrupting(*texts, **options):
        print(*texts, **options)
        shown.append(texts)
        if len(shown) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Engine, "step", slow_step)
    monkeypatch.setattr("onebase.cli.chat.print", interrupting, raising=False)
    said, _ = talk(QUESTION, "/reset", QUESTION, flags=["--base", place.base], short=long)
    assert said.endswith(f"\n{whole}\n")
    cut = said.removesuffix(f"\n{whole}\n")
    assert whole.startswith(cut)
    assert len(cut) < len(whole)
