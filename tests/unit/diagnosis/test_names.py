"""Wrong tensor names put right, and the one change of a path that explains a base's missing modules."""

import pytest

from onebase.diagnosis.names import PREFIX, find_substitution, repair

RIGHT = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("name", "right", "wrongs"),
    [
        (RIGHT, RIGHT, []),
        (f"module.{RIGHT}", RIGHT, ["DataParallel"]),
        (f"_orig_mod.{RIGHT}", RIGHT, ["torch.compile"]),
        (f"{PREFIX}_orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight", RIGHT, ["torch.compile"]),
        (f"{PREFIX}model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight", RIGHT, ["FSDP"]),
        (f"{PREFIX}{RIGHT}", RIGHT, ["twice"]),
        (RIGHT.replace("lora_A", "lora_A.default"), RIGHT, ["adapter's name"]),
        (RIGHT.removeprefix(PREFIX), RIGHT, [f"no {PREFIX}"]),
        (
            f"module.{RIGHT.removeprefix(PREFIX).replace('lora_A', 'lora_A.mine')}",
            RIGHT,
            ["Data", "name", "no "],
        ),
        (f"{PREFIX}wte.lora_embedding_B.default", f"{PREFIX}wte.lora_embedding_B", ["adapter's name"]),
        (f"{PREFIX}head.modules_to_save.default.weight", f"{PREFIX}head.weight", ["adapter's name"]),
        (f"{PREFIX}q.lora_B.bias", f"{PREFIX}q.lora_B.bias", []),
        (f"{PREFIX}q.lora_magnitude_vector", f"{PREFIX}q.lora_magnitude_vector", []),
        (
            f"{PREFIX}q.lora_magnitude_vector.default.weight",
            f"{PREFIX}q.lora_magnitude_vector.weight",
            ["name"],
        ),
        (f"{PREFIX}q.base_layer.lora_A.weight", f"{PREFIX}q.base_layer.lora_A.weight", []),
        (f"{PREFIX}encoder.module.q.lora_A.weight", f"{PREFIX}encoder.module.q.lora_A.weight", []),
    ],
)
def test_repair(name, right, wrongs):
    found = repair([name])
    assert found.names == {name: right}
    assert len(found.wrongs) == len(wrongs)
    assert all(part in wrong for part, wrong in zip(wrongs, found.wrongs, strict=True))
    assert all(names == [name] for names in found.wrongs.values())


def paths(form, layers=6, names=("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")):
    return [form.format(n, name) for n in range(layers) for name in names]


@pytest.mark.parametrize(
    ("wrong", "right", "shown"),
    [
        ("model.layers.{}.{}", "model.language_model.layers.{}.{}", "model. -> model.language_model."),
        ("model.language_model.layers.{}.{}", "model.layers.{}.{}", "model.language_model. -> model."),
        ("layers.{}.{}", "model.layers.{}.{}", "(nothing) -> model."),
        ("transformer.model.layers.{}.{}", "model.layers.{}.{}", "transformer. -> (nothing)"),
        ("language_model.model.layers.{}.{}", "model.language_model.layers.{}.{}", None),
        ("model.layers.{}.block.{}", "model.layers.{}.{}", "block. -> (nothing)"),
        ("model.layers.{}.{}", "model.layers.inner.{}.{}", "model.layers. -> model.layers.inner."),
    ],
)
def test_a_rename_is_found_and_makes_every_path_right(wrong, right, shown):
    valid = [*paths(right), "lm_head", "model.embed_tokens"]
    change, count = find_substitution(paths(wrong), valid)
    assert count == 18
    assert {change.apply(path) for path in paths(wrong)} == set(paths(right))
    assert shown is None or str(change) == shown


def test_a_rename_in_the_middle():
    wrong = paths("h.{}.{}", names=("attention.q_proj", "attention.v_proj"))
    right = paths("h.{}.{}", names=("self_attn.q_proj", "self_attn.v_proj"))
    change, count = find_substitution(wrong, right)
    assert (str(change), count) == ("attention. -> self_attn.", 12)
    assert change.apply("h.3.mlp.up_proj") == "h.3.mlp.up_proj"


def test_what_no_rename_explains():
    assert find_substitution(paths("model.layers.{}.{}"), ["transformer.h.0.attn.c_attn"]) is None
    assert find_substitution([], paths("model.layers.{}.{}")) is None
    beyond = [path.replace(".0.", ".9.") for path in paths("model.layers.{}.{}", layers=1)]
    assert find_substitution(beyond, paths("model.layers.{}.{}")) is None  # never a layer's number


def test_many_names_take_no_time_to_speak_of():
    wrong, right = (
        paths("model.layers.{}.{}", layers=5000),
        paths("model.language_model.layers.{}.{}", layers=200),
    )
    change, count = find_substitution(wrong[:600], right)
    assert (str(change), count) == ("model. -> model.language_model.", 600)
    assert find_substitution(wrong, right) is None  # 600 of 15000: less than half
