"""Adapters with a head go both ways between onebase and PEFT, with the same logits."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from labelled import BASES, NUMBERS, ROWS, labelled_base
from onebase.adapters.injection import injected
from onebase.data.labels import Head
from onebase.data.read import Example
from onebase.errors import BaseError
from onebase.models.loss import head_outputs
from onebase.prediction import encode_rows, predict, read_as_trained
from onebase.storage.format import load_adapter
from onebase.training.run import train
from texts import write_rows

pytestmark = pytest.mark.slow

OPTIONS = {"rank": 2, "lr": 1e-2, "batch_size": 8, "max_steps": 3, "holdout": 4, "samples": 0}
TEXTS = [row["text"] for row in ROWS[:5]]


def transformers_model(folder, outputs, pad_id):
    """transformers' own loading of the saved base, as the model card tells it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=outputs, pad_token_id=pad_id, dtype=torch.float32
        ).eval()


def padded(base, texts):
    """The texts' ids and mask, filled up on the right."""
    coded = base.tokenizer(texts)["input_ids"]
    width = max(map(len, coded))
    ids = torch.tensor([row + [base.pad_id] * (width - len(row)) for row in coded])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in coded])
    return {"input_ids": ids, "attention_mask": mask}


def our_logits(base, adapter, texts):
    headed = base.for_adapter(adapter)
    examples = [Example(n, text=text) for n, text in enumerate(texts, 1)]
    rows = encode_rows(headed, examples, None, read_as_trained(adapter, {})).rows
    with injected(headed.model, adapter), torch.no_grad():
        return head_outputs(headed.model, rows, headed.pad_id)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("task", "rows"), [("classify", ROWS), ("regress", NUMBERS)])
def test_peft_reads_what_we_train(name, task, rows, tmp_path):
    base = labelled_base(name)
    base.model.save_pretrained(tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run = train(base, task=task, data=data, output=str(tmp_path / "run"), **OPTIONS)
    model = transformers_model(tmp_path / "base", 2 if task == "classify" else 1, base.pad_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no key is missing, none too many
        theirs = PeftModel.from_pretrained(model, tmp_path / "run").eval()
    with torch.no_grad():
        logits = theirs(**padded(base, TEXTS)).logits
    ours = our_logits(base, run.adapter, TEXTS)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert (ours - ours.mean(0)).abs().max() > 1e-3  # the texts do matter


@pytest.mark.parametrize("name", BASES)
def test_we_read_what_peft_saves(name, tmp_path):
    base = labelled_base(name)
    base.model.save_pretrained(tmp_path / "base")
    model = transformers_model(tmp_path / "base", 3, base.pad_id)
    # PEFT itself fails on DistilBERT with all-linear: it takes pre_classifier for a target and for a module to save.
    targets = ["q_lin", "lin1"] if name == "distilbert" else "all-linear"
    config = PeftConfig(task_type="SEQ_CLS", r=2, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(model), config).eval()
        theirs.save_pretrained(tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft", base)
    with torch.no_grad():
        logits = theirs(**padded(base, TEXTS)).logits
    torch.testing.assert_close(our_logits(base, adapter, TEXTS), logits, rtol=1e-5, atol=1e-5)
    said = predict(base, TEXTS, adapter)
    assert [one.label for one in said] == [f"LABEL_{n}" for n in logits.argmax(-1).tolist()]
    assert list(said[0].probabilities.values()) == pytest.approx(logits[0].softmax(-1).tolist(), abs=1e-5)


def test_a_module_that_peft_left_at_random_is_named(tmp_path):
    """PEFT saves BERT's classifier, but not the pooler below it, which this base has not stored either."""
    base = labelled_base("bert", pooler=False)
    base.model.save_pretrained(tmp_path / "base")
    model = transformers_model(tmp_path / "base", 2, base.pad_id)
    config = PeftConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    with pytest.raises(BaseError, match=r"no tensors of bert\.pooler"):
        load_adapter(tmp_path / "peft", base)


@pytest.mark.parametrize("name", BASES)
def test_the_model_with_a_head_is_transformers_own(name, tmp_path):
    """The same logits as transformers gives with the same head, padding or not."""
    base = labelled_base(name)
    base.model.save_pretrained(tmp_path / "base")
    headed = base.with_head(Head("classify", ("a", "b", "c")), seed=3)
    model = transformers_model(tmp_path / "base", 3, base.pad_id)
    state = {key: value for key, value in headed.model.state_dict().items() if key.startswith(headed.drawn)}
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(
            headed.model(**padded(base, TEXTS)).logits,
            model(**padded(base, TEXTS)).logits,
            rtol=1e-5,
            atol=1e-5,
        )
