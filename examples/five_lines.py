"""The five lines of the README: `python examples/five_lines.py [BASE] [OUTPUT]`."""

import sys
from pathlib import Path

import onebase

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
output = sys.argv[2] if len(sys.argv) > 2 else "runs/five-lines"
reviews = Path(__file__).with_name("reviews.jsonl")

base = onebase.load_base(name)
run = onebase.train(base, data=str(reviews), output=output, chat=True, holdout=4, epochs=4, batch_size=4)
adapter = onebase.load_adapter(run.folder, base)
prompt = "Is this review positive or negative? The cup holds just enough."
print(onebase.generate(base, prompt, adapter=adapter)[0])
