"""Adapters that make vectors go both ways between onebase and PEFT: the same vectors, loss and gradients."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModel

from labelled import labelled_base
from onebase.adapters.injection import eval_mode, inject, trainable, use
from onebase.config import DataConfig
from onebase.data.pairs import encode_pairs
from onebase.data.read import Example
from onebase.embedding import embed, longest_of
from onebase.models.scoring import choose, scorer
from onebase.storage.format import load_adapter
from onebase.training.run import train
from paired import PAIRS
from texts import text_base, tokenizer, write_rows

pytestmark = pytest.mark.slow

OPTIONS = {
    "task": "embed",
    "rank": 2,
    "lr": 1e-2,
    "batch_size": 8,
    "max_steps": 3,
    "holdout": 4,
    "samples": 0,
}
ANCHORS, POSITIVES = ([row[name] for row in PAIRS[:6]] for name in ("anchor", "positive"))


def saved(name, folder):
    """A base, and its folder as transformers' AutoModel reads it."""
    base = text_base() if name == "llama" else labelled_base(name)
    base.model.save_pretrained(folder)
    return base


def body(folder):
    """The model that PEFT's users of FEATURE_EXTRACTION load, as the model card tells it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def mean_vectors(model, texts):
    """Mean pooling as sentence-transformers' users write it by hand."""
    coded = tokenizer()(texts, return_tensors="pt", padding=True, padding_side="right")
    mask = coded["attention_mask"]
    states = model(input_ids=coded["input_ids"], attention_mask=mask)[0]
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def ranking_loss(model, scale):
    """The mean of MultipleNegativesRankingLoss, written out."""
    one, two = (F.normalize(mean_vectors(model, texts), dim=-1) for texts in (ANCHORS, POSITIVES))
    return F.cross_entropy(scale * one @ two.T, torch.arange(len(one)))


def their_factors(model):
    """PEFT's factors by our names of modules."""
    cut = len("base_model.model.")
    return {
        name[cut:].replace(".lora_A.default.weight", ".A").replace(".lora_B.default.weight", ".B"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "llama"])
def test_peft_reads_what_we_train(name, tmp_path):
    base = saved(name, tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", PAIRS)
    run = train(base, data=data, output=str(tmp_path / "run"), **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no key is missing, none too many
        theirs = PeftModel.from_pretrained(body(tmp_path / "base"), tmp_path / "run").eval()
    assert theirs.peft_config["default"].task_type == "FEATURE_EXTRACTION"
    with torch.no_grad():
        wanted = mean_vectors(theirs, ANCHORS)
    ours = embed(base, ANCHORS, run.adapter)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    assert (ours - embed(base, ANCHORS)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama"])
def test_we_read_what_peft_saves_and_learn_alike(name, tmp_path):
    base = saved(name, tmp_path / "base")
    targets = {"bert": ["query", "dense"], "distilbert": ["q_lin", "lin1"], "llama": "all-linear"}[name]
    config = PeftConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(body(tmp_path / "base")), config).eval()
        theirs.save_pretrained(tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft", base)
    with torch.no_grad():
        torch.testing.assert_close(
            embed(base, ANCHORS, adapter), mean_vectors(theirs, ANCHORS), rtol=1e-5, atol=1e-5
        )

    wanted = ranking_loss(theirs, 20.0)
    wanted.backward()
    ours = base.for_adapter(adapter)
    examples = [
        Example(n, anchor=a, positive=p) for n, (a, p) in enumerate(zip(ANCHORS, POSITIVES, strict=True), 1)
    ]
    config = longest_of(ours, DataConfig(task="embed"))
    rows = encode_pairs(tokenizer(), examples, config, ours.context).rows
    inject(ours.model, adapter, "ours")
    with eval_mode(ours.model), use(ours.model, "ours"):
        parameters = trainable(ours.model, "ours")
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        loss = scorer(ours, choose(ours, "auto", adapter), "ours").loss(rows) / len(rows)
        loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    found = their_factors(theirs)
    assert found.keys() == parameters.keys()
    for path, parameter in parameters.items():
        if "pooler" in path:  # what PEFT's all-linear gives to a layer that makes no vector
            assert parameter.grad is None
            continue
        theirs_grad = found[path].grad
        atol = 1e-4 * float(theirs_grad.abs().max())  # similarities times 20 make small parts round coarsely
        torch.testing.assert_close(parameter.grad, theirs_grad, rtol=1e-4, atol=atol)
    assert max(float(p.grad.abs().max()) for p in parameters.values() if p.grad is not None) > 1e-3
