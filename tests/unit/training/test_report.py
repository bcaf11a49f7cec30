"""The report, the curves and the model card: whole, self-contained, escaped, and true to the record."""

import ast
import math
import re
import threading
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onebase.config import DataConfig, LoraConfig, TrainConfig, flatten
from onebase.training import record as facts
from onebase.training.card import model_card
from onebase.training.curves import MOST_POINTS, as_svg, draw_curves, save_png, smoothed
from onebase.training.report import (
    changes,
    count,
    duration,
    memory_verdict,
    options,
    plain,
    size,
    write_report,
)

EVIL = "<script>alert('x')</script> & \"quotes\" | `ticks` ``` {{ 7 * 7 }} é\n---\n# end"
CONFIG = TrainConfig(seed=7, data=DataConfig(system=EVIL), lora=LoraConfig(rank=8))


def make_record(**changed) -> facts.RunRecord:
    values = {
        "title": "Support answers",
        "base": facts.BaseFacts("org/base", "fp-base", 134_515_008, 269_060_552, "bfloat16", "faster"),
        "adapter": facts.AdapterFacts("runs/my run", 2_442_240, 9_799_104, 8, 32.0, False, "q_proj, v_proj"),
        "coverage": (facts.TargetRow("q_proj", 30, "0-29", "576 → 192", 8),),
        "proof": facts.Proof("fp-base", "fp-base", 272, 0.83),
        "memory": facts.Memory(1_000_000_000, 900_000_000),
        "timing": facts.Timing(252.4, 180, 373_000, 1478.3),
        "command": "onebase train --data rows.jsonl",
        "finished": "3 epochs were done",
        "way": "engine",
        "samples": (facts.Sample("Is it?", "yes", "maybe", "yes"),),
        "before": facts.Score(3.5, 33.1, 0.25),
        "after": facts.Score(0.5, 1.65, 0.75),
        "settings": flatten(CONFIG),
        "data": {"training rows": 4862},
        "machine": {"processor": "two cores"},
        "versions": {"torch": "2.13.0"},
    }
    return facts.RunRecord(**(values | changed))


def make_metrics(steps: int) -> list[dict]:
    lines = [
        {"kind": "step", "step": n, "loss": 2 + 1 / n, "lr": 1e-3 / n, "grad_norm": 0.5}
        for n in range(1, steps + 1)
    ]
    return [*lines, {"kind": "eval", "step": steps, "loss": 2.2, "perplexity": 9.0}]


class Page(HTMLParser):
    """Tags, attributes and text of a page; a tag that is closed out of order is an error."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open, self.texts = set(), [], [], []
        self.feed(text)
        assert self.open == [], "unclosed tags"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def report(tmp_path):
    def write(record: facts.RunRecord, metrics: list[dict]) -> str:
        write_report(record, metrics, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def test_the_page_needs_nothing_else(report):
    html = report(make_record(), make_metrics(60))
    page = Page(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "default-src 'none'" in html
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0


def test_the_page_says_what_the_record_says(report):
    text = Page(report(make_record(), make_metrics(60))).text
    for words in (
        "Exact match, held-out rows 25 → 75 %",
        "Loss per token 3.5 → 0.5 nats",
        "Perplexity 33.1 → 1.65",
        "Trained parameters 1.82% 2.44 M on top of 135 M",
        "Adapter file 9.8 MB 3.64% of the base's 269 MB",
        "Training time 4 min 12 s 180 steps, 373 k tokens",
        "1,478 tokens/s bfloat16, engine batches",
        "Base unchanged: verified All 272 tensors",
        "before fp-base after fp-base",
        "q_proj 0-29 576 → 192 30 8",
        "training rows 4,862",
        "the peak was 10% below the prediction Predicted 1 GB Peak 900 MB",
        "Machine processor two cores Versions torch 2.13.0 Command onebase train --data rows.jsonl",
        "Ended: 3 epochs were done.",
    ):
        assert words in text


def test_only_the_matching_answer_is_marked(report):
    text = Page(report(make_record(), [])).text
    assert "Reference yes Base maybe With the adapter ✓ exact match yes" in text
    assert text.count("✓") == 1


def test_user_text_is_escaped_everywhere(report):
    every = make_record(
        title=EVIL,
        base=facts.BaseFacts(EVIL, EVIL, 1, 1, EVIL, EVIL),
        adapter=facts.AdapterFacts(EVIL, 1, 1, 8, 1.0, True, EVIL),
        coverage=(facts.TargetRow(EVIL, 1, EVIL, EVIL, 1),),
        samples=(facts.Sample(EVIL, EVIL, EVIL, EVIL),),
        proof=facts.Proof(EVIL, "other", 1, 1.0),
        command=EVIL,
        finished=EVIL,
        way=EVIL,
        allowed=(EVIL,),
        data={EVIL: [EVIL]},
        machine={EVIL: EVIL},
        versions={EVIL: EVIL},
    )
    html = report(every, make_metrics(3))
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert "49" not in re.findall(r"ticks.{0,12}", html)[0]
    # <title> is text to a browser; each of the rest shows the prompt as it was typed.
    assert page.texts.count(EVIL) >= 15


def test_a_changed_base_is_shown_in_red(report):
    html = report(make_record(proof=facts.Proof("fp-base", "fp-other", 272, 0.8)), [])
    assert 'class="card proof broken"' in html
    text = Page(html).text
    assert "The base has changed Not to be trusted" in text
    assert "before fp-base after fp-other" in text
    assert "verified" not in text


def test_what_a_run_lacks_is_said(report):
    bare = make_record(
        samples=(), before=None, after=None, way="padded (no packed positions)", allowed=("no-eos",)
    )
    text = Page(report(bare, [])).text
    assert "No rows were held out" in text
    assert "The run took no step." in text
    assert "Rows were scored by padded (no packed positions)" in text
    assert "told to pass over no-eos : an end-of-text token never carries loss" in text
    assert "Before and after" not in text


def test_the_same_run_gives_the_same_page(report):
    assert report(make_record(), make_metrics(60)) == report(make_record(), make_metrics(60))


def test_options_are_parted_by_their_defaults():
    parts = options(flatten(CONFIG) | {"gone": 1})
    assert parts["changed"] == {"seed": 7, "rank": 8, "system": EVIL, "gone": 1}
    assert (parts["default"]["lr"], parts["default"]["clip"]) == (0, 1.0)
    assert parts["default"]["exclude_modules"] == []


def test_changes_know_which_way_is_better():
    found = changes(facts.Score(1.0, 2.7, 0.5), facts.Score(2.0, 2.7, 0.6))
    assert [(c.label, c.verdict) for c in found] == [
        ("Exact match", "good"),
        ("Loss per token", "bad"),
        ("Perplexity", "same"),
    ]
    assert changes(None, facts.Score(1.0, 2.7)) == []
    diverged = changes(facts.Score(1.0, 2.7), facts.Score(math.nan, math.inf))
    assert [c.verdict for c in diverged] == ["bad", "bad"]


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (count, 9_999, "9,999"),
        (count, 10_000, "10 k"),
        (count, 999_999, "1 M"),
        (count, 134_515_008, "135 M"),
        (count, 0.9512, "0.951"),
        (count, 1234.5, "1.23 k"),
        (count, math.inf, "n/a"),
        (size, 999, "999 bytes"),
        (size, 9_799_104, "9.8 MB"),
        (size, 999_999_999, "1 GB"),
        (size, 5_000_000_000_000, "5,000 GB"),
        (duration, 0.83, "0.8 s"),
        (duration, 59.6, "1 min 0 s"),
        (duration, 252.4, "4 min 12 s"),
        (duration, 7260, "2 h 1 min"),
        (plain, [], "–"),
        (plain, {"q_proj": 4, "v_proj": 8}, "q_proj=4, v_proj=8"),
        (plain, True, "yes"),
        (plain, 5e-4, "0.0005"),
        (plain, 1e-8, "1e-08"),
        (plain, math.nan, "not a number"),
        (plain, "\n", "'\\n'"),
        (memory_verdict, facts.Memory(100, 112), "the peak was 12% above the prediction"),
        (memory_verdict, facts.Memory(1000, 1001), "the peak met the prediction"),
        (memory_verdict, facts.Memory(0, 5), "there was no prediction"),
    ],
)
def test_how_values_are_written(function, value, text):
    assert function(value) == text


# Curves


def split(metrics):
    return [[event for event in metrics if event["kind"] == kind] for kind in ("step", "eval")]


def test_the_svg_is_well_formed_and_repeatable():
    figure = draw_curves(*split(make_metrics(50)))
    svg = as_svg(figure, "one")
    assert svg == as_svg(figure, "one") == as_svg(draw_curves(*split(make_metrics(50))), "one")
    root = ElementTree.fromstring(svg)
    texts = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"training (smoothed)", "validation", "Learning rate", "Gradient norm", "step"} <= texts
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert all(name.startswith("one-") for name in ids)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    assert used <= set(ids)
    assert used
    assert "DejaVu" not in svg
    assert "<style" not in svg


def test_every_colour_of_the_svg_can_be_set_by_the_page():
    svg = as_svg(draw_curves(*split(make_metrics(50))))
    bare = re.sub(r"var\(--chart-[a-z]+, #[0-9a-f]{6}\)", "", svg)
    assert re.findall(r"(?:fill|stroke): *(#[0-9a-f]{3,6})", bare) == []


def test_curves_hold_the_values():
    steps, evals = split(make_metrics(30))
    steps[9]["loss"] = None  # as metrics.jsonl holds a NaN
    axes = {axis.get_title(loc="left"): axis for axis in draw_curves(steps, evals).axes}
    raw, smooth, validation = axes["Loss per token (nats)"].lines
    expected = [math.nan if n == 10 else 2 + 1 / n for n in range(1, 31)]
    np.testing.assert_array_equal(raw.get_ydata(), expected)
    np.testing.assert_array_equal(smooth.get_xdata(), np.arange(1, 31))
    assert validation.get_xydata().tolist() == [[30.0, 2.2]]
    np.testing.assert_allclose(axes["Learning rate"].lines[0].get_ydata(), [1e-3 / n for n in range(1, 31)])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
def test_next_to_nothing_can_be_drawn(steps, narrow):
    events = split(make_metrics(1))[0][:steps]
    assert as_svg(draw_curves(events, [], narrow)).startswith("<svg")


def test_a_long_run_keeps_its_spikes_and_a_small_file():
    steps = [{"step": n, "loss": 100.0 if n == 12_345 else 1.0 + n % 7} for n in range(1, 50_001)]
    raw = draw_curves(steps, []).axes[0].lines[0].get_xydata()
    assert len(raw) <= MOST_POINTS + 2
    assert [12_345.0, 100.0] in raw.tolist()
    assert raw[0].tolist() == [1.0, 2.0]
    assert raw[-1, 0] == 50_000


def test_smoothing_is_centred_and_skips_what_is_not_a_number():
    line = np.arange(200.0)
    np.testing.assert_allclose(smoothed(line)[5:-5], line[5:-5])  # no lag
    line[100] = math.nan
    assert np.isfinite(smoothed(line)).all()
    np.testing.assert_allclose(smoothed(np.full(200, 3.0)), 3.0)  # no droop at the ends
    np.testing.assert_array_equal(smoothed(np.array([1.0, math.nan, 5.0])), [1.0, math.nan, 5.0])


def test_png_is_written_whole(tmp_path):
    save_png(draw_curves(*split(make_metrics(5))), tmp_path / "new" / "curves.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["curves.png"]
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_drawing_from_threads_leaves_no_state():
    def draw():
        results.append(as_svg(draw_curves(*split(make_metrics(5)))))

    results: list[str] = []
    before = dict(matplotlib.rcParams)
    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert len(set(results)) == 1
    assert dict(matplotlib.rcParams) == before


# The model card


@settings(max_examples=50)
@example("org/base")
@example("a: b # c\n---\nx: y")
@example("yes")
@example("123")
@example("C:\\models\\'base'")
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1))
def test_base_model_survives_yaml(name):
    record = make_record()
    card = model_card(replace(record, base=replace(record.base, name=name)))
    head = yaml.safe_load(re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)[1])
    assert (head["base_model"], head["library_name"], head["tags"]) == (name, "peft", ["lora", "onebase"])


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", card, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["org/base", 'it\'s "quoted" \\ back'])
def test_the_code_of_the_card_names_base_and_folder(name):
    record = make_record()
    card = model_card(replace(record, base=replace(record.base, name=name)))
    (code,) = blocks(card, "python")
    constants = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert {name, "my run", "bfloat16"} <= constants
    (shell,) = blocks(card, "sh")
    assert "--adapter 'my run'" in shell


def test_the_card_says_what_the_record_says():
    card = model_card(make_record(allowed=("no-eos",)))
    for words in (
        "# Support answers\n",
        "| training rows | 4,862 |",
        "pass over: `no-eos`.",
        "| Exact match (%) | 25 | 75 |",
        "| Loss per token (nats) | 3.5 | 0.5 |",
        "| rank | 8 |",
        "Fingerprint: `fp-base`",
        "after training was the same.",
    ):
        assert words in card
    assert "| output |" not in card  # a place on this machine says nothing about the adapter
    changed = model_card(make_record(proof=facts.Proof("fp-base", "fp-x", 2, 0.1), before=None, after=None))
    assert "was **different**: `fp-x`" in changed
    assert "No rows were held out." in changed


def test_no_text_breaks_out_of_its_place_in_the_card():
    card = model_card(
        make_record(title=EVIL, samples=(facts.Sample(EVIL, EVIL, "````", ""),), data={EVIL: EVIL})
    )
    outside = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", card, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in re.sub(r"\\<", "", outside)
    assert re.findall(r"^# end", outside, flags=re.MULTILINE) == []
    assert "`````\n````\n`````" in card
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 4}
