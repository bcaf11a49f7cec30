"""Makes docs/img/serve.png: `PYTHONPATH=tests python docs/img/serve_page.py` from the root; needs a Chromium.

Two adapters are trained on the demo's messages, one to answer with JSON, one with a sentence (minutes on a CPU; in
runs/page, and taken from there the next time). Then a real server serves them, a real browser asks both, and the page
is photographed as it stands.
"""

import json
import tempfile
from pathlib import Path

import onebase
from browser import Page, find_chromium, serving
from onebase.demo import read_demo

RUNS = Path("runs/page")
PICTURE = Path(__file__).with_name("serve.png")
QUESTION = (
    "Hello! My blue lamp from 3 May, order K4471, has still not come. Where is it? It is rather urgent."
)
TRAINING = {"max_steps": 40, "batch_size": 8, "lr": 2e-3, "holdout": 0, "rank": 8}
WANTS = {
    "refund": "wants the money back for",
    "exchange": "wants another one for",
    "cancel": "cancels the order of",
    "tracking": "asks for the whereabouts of",
    "repair": "wants a repair of",
    "address": "gives a new address for",
}


def sentence(answer):
    """The demo's JSON answer in words."""
    told = json.loads(answer)
    order = f", order {told['order']}" if told["order"] else ""
    urgent = " It is urgent." if told["urgent"] else " There is no hurry."
    return f"The customer {WANTS[told['intent']]} the {told['product']}{order}.{urgent}"


def adapters(base):
    """Train what is not there yet."""
    rows = [json.loads(line) for line in Path(read_demo()).read_text().splitlines()]
    kinds = {"support-json": lambda answer: answer, "support-summary": sentence}
    for name, answered in kinds.items():
        if (RUNS / name / "adapter_config.json").is_file():
            continue
        RUNS.mkdir(parents=True, exist_ok=True)
        data = RUNS / f"{name}.jsonl"
        told = [{"prompt": row["prompt"], "completion": answered(row["completion"])} for row in rows]
        data.write_text("".join(json.dumps(row) + "\n" for row in told))
        onebase.train(base, data=str(data), output=str(RUNS / name), overwrite=True, **TRAINING)


def main():
    """Train, serve, ask, photograph."""
    base = onebase.load_base("smollm2-135m", "float32")
    adapters(base)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        serving(base, RUNS, context=1024) as url,
        Page(find_chromium(), folder, (1180, 900)) as page,
    ):
        page.open(url)
        page.wait("document.querySelector('#model-left').options.length === 3")
        for side, name in (("left", "support-json"), ("right", "support-summary")):
            button = f"one.dataset.side === '{side}' && one.dataset.model === '{name}'"
            page.run(f"[...document.querySelectorAll('button')].find((one) => {button}).click()")
        page.run("document.querySelector('#message').focus()")
        page.type(QUESTION)
        page.press("Enter")
        page.wait("document.querySelector('#send').disabled === false")
        page.run("new Promise((done) => setTimeout(done, 1000))")  # the list, once both answers are over
        page.picture(PICTURE)


if __name__ == "__main__":
    main()
