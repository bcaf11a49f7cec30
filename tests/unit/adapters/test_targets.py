"""What a config matches, and what it refuses to match."""

import pytest
import torch
from torch import nn

from layer_cases import Parameters
from onebase.adapters.injection import new_adapter
from onebase.adapters.targets import match, split_path
from onebase.config import LoraConfig
from onebase.errors import ConfigError, TargetError
from tiny import tiny


def paths(model, **options):
    return [t.path for t in match(model, LoraConfig(rank=2, **options)).targets]


def test_all_linear_is_every_linear_layer_but_the_head():
    found = paths(tiny("llama"))
    assert len(found) == 2 * 7
    assert not any("lm_head" in path or "embed" in path for path in found)


ATTENTION = {f"self_attn.{side}_proj" for side in "qkvo"}
BERT_SELF = {f"attention.self.{name}" for name in ("query", "key", "value")}
LINEARS = {
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "mixtral": ATTENTION | {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
    "bert": {*BERT_SELF, "attention.output.dense", "intermediate.dense", "output.dense"},
}


@pytest.mark.parametrize("arch", LINEARS)
def test_all_linear_on_other_architectures(arch):
    found = paths(tiny(arch))
    inside = {(split_path(p)[1], split_path(p)[2]) for p in found if split_path(p)[1] is not None}
    assert inside == {(layer, rest) for layer in (0, 1) for rest in LINEARS[arch]}
    assert {p for p in found if split_path(p)[1] is None} == ({"pooler.dense"} if arch == "bert" else set())


def test_names_and_patterns_match_whole_parts_of_a_path():
    model = nn.ModuleDict(
        {"q_proj": nn.Linear(4, 4), "xq_proj": nn.Linear(4, 4), "q_proj_2": nn.Linear(4, 4)}
    )
    assert paths(model, target_modules="q_proj") == ["q_proj"]
    assert paths(model, target_modules="re:.*q_proj") == ["q_proj", "xq_proj"]
    assert paths(model, exclude_modules="q_proj") == ["xq_proj", "q_proj_2"]
    with pytest.raises(TargetError, match="no module is named proj"):
        paths(model, target_modules="proj")
    config = LoraConfig(rank=2, rank_pattern={"q_proj": 1, "x?q_proj": 3, "never|.*": 4})
    assert [t.rank for t in match(model, config).targets] == [1, 3, 4]  # the first key that fits


def test_layers_are_counted_in_each_stack():
    def stack(layers):
        return nn.ModuleList(nn.ModuleDict({name: nn.Linear(2, 2) for name in "ab"}) for _ in range(layers))

    model = nn.ModuleDict({"enc": stack(3), "dec": stack(2), "out": nn.Linear(2, 2)})
    assert paths(model, target_modules="a", layers="0,2") == ["enc.0.a", "enc.2.a", "dec.0.a"]
    assert match(model, LoraConfig(rank=1, target_modules="a", layers="2")).uneven == ()
    some = LoraConfig(rank=1, target_modules=r"re:enc\.[02]\.a|dec\..*\.b")
    assert match(model, some).uneven == ("enc.*.a matches layers 0,2 of 0-2",)


def test_modules_trained_in_full_carry_no_update():
    coverage = match(tiny("llama"), LoraConfig(rank=2, modules_to_save="mlp,lm_head"))
    assert coverage.full == ("model.layers.0.mlp", "model.layers.1.mlp", "lm_head")
    assert {split_path(t.path)[2] for t in coverage.targets} == ATTENTION


def test_names_regex_layers_and_exclusions():
    model = tiny("llama")
    assert paths(model, target_modules="q_proj,v_proj", layers="1") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert paths(model, target_modules=r"re:.*layers\.0\.mlp\.(up|down)_proj") == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert not any("mlp" in p for p in paths(model, exclude_modules="re:.*mlp.*"))
    assert paths(model, target_modules=["lm_head"]) == ["lm_head"]
    assert paths(model, target_modules=["self_attn.q_proj"], layers="0-1") == paths(
        model, target_modules=["q_proj"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "q_porj"}, r"no module is named q_porj\n  nearest valid: q_proj"),
        ({"target_modules": "q_proj,self_attn"}, "self_attn is a LlamaAttention, which carries no update"),
        ({"target_modules": "re:.*q_porj"}, "the pattern matches no module"),
        ({"exclude_modules": "k_porj"}, r"excludes nothing\n  nearest valid: k_proj"),
        ({"layers": "1-3"}, "layers 1-3: 2-3: the model has layers 0-1"),
        (
            {"rank_pattern": {"q_porj": 1}},
            r"rank_pattern q_porj: matches no targeted module\n  nearest valid: q_proj",
        ),
        ({"alpha_pattern": {"lm_head": 1}}, "alpha_pattern lm_head: matches no targeted module"),
        ({"modules_to_save": "lm_heda"}, r"no module of that name\n  nearest valid: lm_head"),
        (
            {"rank_pattern": {"k_proj": 17}},
            "rank 17 for model.layers.0.self_attn.k_proj: the weight is 16 x 32",
        ),
        ({"target_modules": "q_proj", "exclude_modules": "q_proj"}, "nothing is left to adapt"),
    ],
)
def test_what_matches_nothing_is_an_error(options, message):
    with pytest.raises(TargetError, match=message):
        paths(tiny("llama"), **options)


def test_uneven_targets_are_named():
    coverage = match(tiny("llama"), LoraConfig(rank=2, target_modules=r"re:.*layers\.1\.mlp\.up_proj"))
    assert coverage.uneven == ("model.layers.*.mlp.up_proj matches layers 1 of 0-1",)
    assert match(tiny("llama"), LoraConfig(rank=2, target_modules="up_proj", layers="1")).uneven == ()
    with pytest.raises(TargetError, match="matches layers 1 of 0-1"):
        new_adapter(tiny("llama"), LoraConfig(rank=2, target_modules=r"re:.*layers\.1\.mlp\.up_proj"))


def test_coverage_report():
    config = LoraConfig(
        rank=4, alpha=8, target_modules="q_proj,embed_tokens", rank_pattern={r"layers\.1\..*": 2}
    )
    rows = match(tiny("llama"), config).rows()
    assert [tuple(row) for row in rows] == [
        ("model.embed_tokens", 1, "", (96, 32), 4, 2.0),
        ("model.layers.*.self_attn.q_proj", 1, "0", (32, 32), 4, 2.0),
        ("model.layers.*.self_attn.q_proj", 1, "1", (32, 32), 2, 4.0),
    ]


def test_patterns_follow_peft():
    config = LoraConfig(
        rank=4, alpha=8, rank_pattern={r"layers\.0\..*": 2}, alpha_pattern={"q_proj": 3}, rslora=True
    )
    found = {t.path: t for t in match(tiny("llama"), config).targets}
    q0, q1 = (found[f"model.layers.{n}.self_attn.q_proj"] for n in (0, 1))
    assert (q0.rank, q1.rank) == (2, 4)
    assert (q0.scale, q1.scale) == (3 / 2**0.5, 3 / 2)


def test_names_in_the_adapter_mean_exactly_what_was_matched():
    model = tiny("llama")
    assert new_adapter(model, LoraConfig(rank=2, exclude_modules="k_proj")).config.target_modules == (
        "down_proj",
        "gate_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )
    full = new_adapter(model, LoraConfig(rank=2, target_modules="q_proj", layers="1")).config
    assert full.target_modules == ("model.layers.1.self_attn.q_proj",)


def test_multihead_attention_is_adapted_through_its_parameters():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    inside = ["mha.in_proj_weight", "mha.out_proj.weight"]
    assert paths(model) == [*inside, "fc"]
    assert paths(model, target_modules="mha") == inside
    assert paths(model, target_modules="out_proj") == inside[1:]


def test_all_linear_never_means_a_parameter_that_is_no_matrix_product():
    found = paths(tiny("vit"))
    assert not any("embeddings" in path for path in found)  # position embeddings, class token, patches
    assert paths(nn.ModuleDict({"heads": Parameters.Heads(), "fc": nn.Linear(4, 4)})) == ["fc"]


@pytest.mark.parametrize(("arch", "experts"), [("mixtral", True), ("qwen3-moe", True), ("gpt-oss", False)])
def test_all_linear_means_what_it_means_to_peft_in_mixtures(arch, experts):
    inside = {split_path(path)[2] for path in paths(tiny(arch))}
    more = {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert inside == ATTENTION | (more if experts else set())


def test_all_linear_takes_layers_that_are_smaller_than_the_rank():
    model = tiny("mixtral")  # its router has four outputs, as many as experts
    found = {t.path: t.rank for t in match(model, LoraConfig(rank=16)).targets}
    assert found["model.layers.0.mlp.gate.weight"] == 16
    with pytest.raises(
        TargetError, match=r"gate.weight: the weight is 4 x 32, so a rank above 4 adds nothing"
    ):
        match(model, LoraConfig(rank=16, target_modules="q_proj", target_parameters="gate.weight"))


def test_t5_and_vit():
    names = {split_path(path)[2].rpartition(".")[2] for path in paths(tiny("t5"))}
    assert names == {"q", "k", "v", "o", "wi", "wo"}
    assert paths(tiny("vit"), target_modules="projection") == ["vit.embeddings.patch_embeddings.projection"]
    (uneven,) = match(tiny("t5"), LoraConfig(rank=2, target_modules="relative_attention_bias")).uneven[:1]
    assert uneven.endswith("relative_attention_bias matches layers 0 of 0-1")


def test_parameters_are_named_as_in_peft():
    model = Parameters()
    found = match(model, LoraConfig(rank=2, target_modules=[], target_parameters="inner.down,up,heads.mix"))
    assert [t.path for t in found.targets] == ["inner.down", "inner.up", "heads.mix"]
    assert {t.site.kind for t in found.targets} == {"parameter"}
    assert [t.site.blocks for t in found.targets] == [1, 1, 4]
    ranks = LoraConfig(rank=2, target_modules=[], target_parameters="up,down", rank_pattern={"up": 3})
    assert [t.rank for t in match(model, ranks).targets] == [2, 3]
    assert paths(tiny("gpt-oss"), target_modules="", target_parameters="down_proj", layers="1") == [
        "model.layers.1.mlp.experts.down_proj"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": "inner.downn"}, r"no parameter is named inner.downn\n  nearest valid: down"),
        ({"target_parameters": "own"}, "own: a parameter of the model itself has no module around it"),
        ({"target_parameters": "four"}, "inner.four: an update needs a matrix"),
        ({"target_parameters": "fc.bias"}, "fc.bias: an update needs a matrix"),
        ({"target_parameters": "fc.weight"}, "fc.weight: its module fc is targeted too"),
        ({"target_parameters": "up", "dropout": 0.1}, "inner.up is a parameter, whose update has no input"),
        (
            {"target_parameters": "mha.in_proj_weight", "target_modules": "mha"},
            "its module mha is targeted too",
        ),
        ({"target_modules": "mha", "dropout": 0.1}, "mha.in_proj_weight is a parameter"),
        ({"target_modules": "grouped"}, "grouped is a Conv1d of 2 groups, which has no single W"),
    ],
)
def test_parameters_that_cannot_be_adapted(options, message):
    model = Parameters()
    model.own, model.inner.four = (nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2, 2, 2, 2)))
    model.fc, model.mha = nn.Linear(4, 4), nn.MultiheadAttention(4, 2)
    model.grouped = nn.Conv1d(4, 4, 1, groups=2)
    with pytest.raises(TargetError, match=message):
        paths(model, **({"target_modules": "fc"} | options))


def test_a_whole_attention_has_peft_name_and_a_part_of_it_its_own():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})

    def resolved(**options):
        config = new_adapter(model, LoraConfig(rank=2, **options)).config
        return config.target_modules, config.target_parameters

    assert resolved() == (("fc", "mha"), ())
    assert resolved(target_modules="mha") == (("mha",), ())
    assert resolved(target_modules="in_proj_weight") == ((), ("mha.in_proj_weight",))
    assert resolved(target_modules="out_proj") == (("mha.out_proj.weight",), ())
    assert resolved(exclude_modules="mha") == (("fc",), ())
    ranks = match(model, LoraConfig(rank=2, rank_pattern={"mha": 1})).targets
    assert [t.rank for t in ranks] == [1, 1, 2]


def test_names_of_parameters_mean_exactly_those():
    model = nn.ModuleDict({"a": Parameters(), "b": Parameters()})
    config = LoraConfig(rank=2, target_modules=[], target_parameters="a.inner.up,a.inner.down")
    assert new_adapter(model, config).config.target_parameters == ("a.inner.down", "a.inner.up")
    both = LoraConfig(rank=2, target_modules=[], target_parameters="up")
    assert new_adapter(model, both).config.target_parameters == ("inner.up",)


@pytest.mark.parametrize("text", ["a", "3-1", "1-", "-2", "1,,2"])
def test_bad_layer_ranges(text):
    with pytest.raises(ConfigError, match="layers"):
        LoraConfig(layers=text)
