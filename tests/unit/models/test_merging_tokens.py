"""Merging trained token rows: in memory and from file to file, with new tokens and the tokenizer that knows them."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import trained
from onebase.adapters.adapter import Origin
from onebase.adapters.injection import base_tensors, injected, new_adapter
from onebase.config import LoraConfig
from onebase.errors import BaseMismatch
from onebase.models import base as bases
from onebase.models.merging import check_merge, plan_merge
from onebase.models.vocabulary import resolve_tokens
from onebase.transforms.merge import merged
from onebase.transforms.merge_files import OutputOptions, merge_files
from texts import save_base, text_base
from tiny import output, some_ids, tiny

ARCHS = ("llama", "llama-tied", "gpt2", "gemma3")


def adapter_of(model, arch, tokens=("id:40", "id:96", "id:3", "id:97"), targets=("q_proj",), **options):
    names = ["c_attn" if arch == "gpt2" else name for name in targets]
    return trained(
        model, LoraConfig(rank=2, alpha=6, target_modules=names, trainable_tokens=list(tokens), **options)
    )


def ids_for(tokens):
    ids = some_ids()
    ids[0, 1], ids[1, 4] = 40, 3
    if "id:96" in tokens:
        ids[0, 3], ids[2, 5] = 96, 97
    return ids


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


TOKENS = [("id:40", "id:3"), ("id:96", "id:97"), ("id:40", "id:96", "id:3", "id:97")]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_merged_model_gives_what_base_and_adapter_give(arch, tokens, tmp_path):
    model, ids = tiny(arch), ids_for(tokens)
    adapter = adapter_of(model, arch, tokens)
    bits = {name: tensor.clone() for name, tensor in base_tensors(model)}
    with injected(model, adapter):
        wanted = output(model, ids)
    with merged(model, adapter):
        torch.testing.assert_close(output(model, ids), wanted, rtol=1e-4, atol=1e-4)
        if arch != "llama":
            assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    after = dict(base_tensors(model))
    assert after.keys() == bits.keys()
    assert all(torch.equal(tensor, bits[name]) for name, tensor in after.items())
    model.save_pretrained(tmp_path / "base")
    plan = plan_merge(tmp_path / "base", adapter)
    small = OutputOptions(shard_bytes=9000)
    for number, options in enumerate((OutputOptions(), small)):
        result = load(merge_files(plan, tmp_path / f"merged-{number}", options))
        assert result.config.vocab_size == 96 + 2 * ("id:96" in tokens)
        assert result.config.tie_word_embeddings == (arch != "llama")
        torch.testing.assert_close(output(result, ids), wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_several_pieces_and_over_an_update(tmp_path, monkeypatch):
    """Pieces of 16 rows; a low-rank update of the embedding lies under the rows, and unties the head."""
    monkeypatch.setattr("onebase.transforms.merge_files.PIECE", 16 * 32)
    model, ids = tiny("llama"), ids_for(TOKENS[2])
    adapter = adapter_of(model, "llama", [*TOKENS[2], "id:15", "id:16"], ["q_proj", "embed_tokens"])
    with injected(model, adapter):
        wanted = output(model, ids)
    with merged(model, adapter):
        torch.testing.assert_close(output(model, ids), wanted, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "base")
    result = load(merge_files(plan_merge(tmp_path / "base", adapter), tmp_path / "merged"))
    torch.testing.assert_close(output(result, ids), wanted, rtol=1e-4, atol=1e-4)


def test_tied_weights_with_rows_of_their_own_are_untied(tmp_path):
    model, ids = tiny("llama-tied"), ids_for(TOKENS[0])
    adapter = adapter_of(model, "llama-tied", TOKENS[0])
    (rows,) = adapter.tokens.values()
    adapter = replace(adapter, tokens=adapter.tokens | {"lm_head": rows._replace(rows=rows.rows * 2)})
    with injected(model, adapter):
        wanted = output(model, ids)
    with merged(model, adapter):
        torch.testing.assert_close(output(model, ids), wanted, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "base")
    result = load(merge_files(plan_merge(tmp_path / "base", adapter), tmp_path / "merged"))
    assert not result.config.tie_word_embeddings
    torch.testing.assert_close(output(result, ids), wanted, rtol=1e-4, atol=1e-4)


def test_the_merged_folder_has_a_tokenizer_that_knows_the_new_tokens(tmp_path):
    base, folder = text_base(), save_base(tmp_path / "base")
    words = resolve_tokens(base, ["<tool>", "</tool>"])
    fresh = new_adapter(
        base.model,
        LoraConfig(rank=2, target_modules="q_proj", trainable_tokens=words.names),
        origin=Origin(tokens=words.new),
    )
    output_folder = merge_files(plan_merge(folder, fresh), tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(output_folder)
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in words.new} == words.new
    assert tokenizer("a<tool>b")["input_ids"] == words.base.tokenizer("a<tool>b")["input_ids"]
    assert tokenizer.chat_template == base.tokenizer.chat_template
    loaded = bases.load_base(output_folder, "float32")
    assert len(loaded.tokenizer) == len(loaded.model.get_input_embeddings().weight) == len(base.tokenizer) + 2
    check = check_merge(folder, fresh, output_folder)
    assert check.difference <= 1e-4 * check.largest
    assert json.loads((output_folder / "config.json").read_text())["vocab_size"] == len(base.tokenizer) + 2


def test_an_embedding_cannot_grow_without_its_head(tmp_path):
    model = tiny("llama")
    adapter = adapter_of(model, "llama")
    adapter = replace(adapter, tokens={"model.embed_tokens": adapter.tokens["model.embed_tokens"]})
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(BaseMismatch, match="the head has no rows for new tokens"):
        plan_merge(tmp_path / "base", adapter)
    with pytest.raises(BaseMismatch, match="the head has no rows for new tokens"), merged(model, adapter):
        pass
    with injected(model, adapter):
        assert output(model, ids_for(TOKENS[2])).shape[-1] == 96
