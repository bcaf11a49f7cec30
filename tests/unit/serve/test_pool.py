"""The pool: what is found, refused, kept and let go; and requests that outlive their adapter's files."""

import shutil
from collections.abc import Sized

import pytest
import torch

from adapters import trained
from decoders import decoder
from onebase.config import LoraConfig
from onebase.errors import AdapterNameError, ConfigError, MissingFile, OnebaseError
from onebase.serve.engine import Engine
from onebase.serve.pool import AdapterPool
from onebase.serve.request import Limits, NoRoom, Request, UnknownAdapter
from onebase.storage.format import load_adapter, save_adapter
from serving import adapter_folder, alone, drained, make_engine, tokens_of, wrap_base

PROMPT = (3, 7, 11, 20)


@pytest.fixture(scope="module")
def base():
    return wrap_base(decoder("llama"))


def size_of(pool, name):
    return pool.find(name).bytes


def test_a_folder_is_searched_and_the_broken_are_refused_with_the_reason(base, tmp_path):
    adapter_folder(tmp_path, base, 2)
    shutil.copytree(tmp_path / "a0", tmp_path / "cut")
    tensors = tmp_path / "cut" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    (tmp_path / "notes").mkdir()
    (tmp_path / "text.txt").write_text("no adapter")
    shutil.copytree(tmp_path / "a0", tmp_path / ".a0.tmp")
    pool = AdapterPool(base, tmp_path)
    assert pool.names() == ["a0", "a1"]
    assert [*pool.refused()] == ["cut"]
    assert "cut short" in pool.refused()["cut"]
    assert str(pool.folder) not in pool.refused()["cut"]
    with pytest.raises(UnknownAdapter, match=r"refused.*cut short"):
        pool.find("cut")
    with pytest.raises(UnknownAdapter, match="a0"):
        pool.find("a00")
    shutil.rmtree(tmp_path / "cut")
    shutil.copytree(tmp_path / "a1", tmp_path / "cut")
    shutil.rmtree(tmp_path / "a0")
    pool.refresh()
    assert (pool.names(), pool.refused()) == (["a1", "cut"], {})
    with pytest.raises(MissingFile):
        AdapterPool(base, tmp_path / "nowhere")


def test_a_relative_folder_is_the_one_of_the_start(base, tmp_path, monkeypatch):
    made = adapter_folder(tmp_path / "adapters", base)
    monkeypatch.chdir(tmp_path)
    pool = AdapterPool(base, "adapters")
    monkeypatch.chdir("/")
    pool.refresh()
    assert pool.names() == [name for name in made if name]
    assert pool.refused() == {}
    pool.load("again", "a0")


def test_another_bases_adapter_is_refused(base, tmp_path):
    other = wrap_base(decoder("qwen3"))
    adapter_folder(tmp_path, other, 1)
    pool = AdapterPool(base, tmp_path)
    assert pool.names() == []
    assert "does not fit" in pool.refused()["a0"]


def test_adapters_in_use_stay_and_the_least_recently_used_go(base, tmp_path):
    adapter_folder(tmp_path, base, 7)  # a0, a3 and a6 have the same size
    pool = AdapterPool(base, tmp_path)
    pool.budget = 2 * size_of(pool, "a0")
    first = pool.acquire(pool.find("a0"))
    second = pool.acquire(pool.find("a3"))
    with pytest.raises(NoRoom):
        pool.acquire(pool.find("a6"))
    pool.release(second)
    pool.release(first)
    pool.release(pool.acquire(pool.find("a0")))
    pool.release(pool.acquire(pool.find("a6")))
    assert [name for name in pool.names() if pool.info(name).loaded] == ["a0", "a6"]
    assert (pool.loads, pool.hits) == (3, 1)
    assert pool.bytes == pool.budget
    pool.budget -= 1
    with pytest.raises(ConfigError, match="adapters may take"):
        pool.acquire(pool.find("a2"))  # rank 8: as large as the two


def test_memory_grows_with_the_adapters_in_use_alone(base, tmp_path):
    adapter_folder(tmp_path, base, 4)
    pool = AdapterPool(base, tmp_path)
    assert pool.bytes == 0
    pinned = pool.acquire(pool.find("a1"))
    assert pool.bytes == sum(t.nbytes for t in pinned.adapter.tensors().values()) == size_of(pool, "a1")


def test_what_was_just_loaded_by_name_is_not_read_again_unless_it_changed(base, tmp_path, monkeypatch):
    adapter_folder(tmp_path, base, 2)
    pool, reads = AdapterPool(base), []
    read = pool._reader.read
    monkeypatch.setattr(pool._reader, "read", lambda folder: reads.append(folder.name) or read(folder))
    first = pool.load("x", tmp_path / "a0")
    assert (pool.bytes, reads) == (first.bytes, ["a0"])
    assert pool.acquire(first).adapter == load_adapter(tmp_path / "a0", base)
    assert reads == ["a0"]
    one = pool.load("y", tmp_path / "a1")
    save_adapter(load_adapter(tmp_path / "a0", base), tmp_path / "a1", overwrite=True)
    pinned = pool.acquire(one)
    assert pinned.adapter == load_adapter(tmp_path / "a0", base)
    assert pinned.version != one.version
    pool.load("z", tmp_path / "a0")
    pool.load("z", tmp_path / "a1", replace=True)
    assert pool.bytes == 3 * first.bytes
    pool.unload("z")
    assert pool.bytes == 2 * first.bytes


def test_under_a_small_budget_every_request_is_answered(base, tmp_path):
    made = adapter_folder(tmp_path, base, 4)
    engine = make_engine(base, tmp_path)
    engine.pool.budget = size_of(engine.pool, "a2")  # of rank 8: two of rank 4 fit, none beside it
    names = ["a0", "a2", "a1", "a3", "a0", "a2", "a1"]
    results = engine.generate([Request(str(n), PROMPT, name, max_tokens=4) for n, name in enumerate(names)])
    assert [r.tokens for r in results] == [alone(base, made[name], PROMPT, 4)[0] for name in names]
    both = Request("never", PROMPT, mixture=(("a2", 0.5), ("a0", 0.5)))
    assert [(r.finish, "memory budget" in r.error) for r in engine.generate([both])] == [("error", True)]
    assert engine.pool.bytes <= engine.pool.budget


def test_one_budget_holds_keys_adapters_and_the_slots_factors(base, tmp_path):
    """Rank 8 in 3 slots fits alone: it waits for the others, and answers; with a byte less it fails, they go on."""
    made = adapter_folder(tmp_path, base, 3)
    probe = make_engine(base, tmp_path)
    probe.generate([Request("r", PROMPT, "a2", max_tokens=1)])
    most = probe.stats().kv_bytes + probe.stats().adapter_bytes
    names = ["a0", "a2", "a1", "a2", "a0"]
    requests = [Request(str(n), PROMPT, name, max_tokens=4) for n, name in enumerate(names)]
    for total, finish in ((most, "length"), (most - 1, "error")):
        engine = make_engine(base, tmp_path, kv_and_adapter_bytes=total)
        for request, result in zip(requests, engine.generate(requests), strict=True):
            stats = engine.stats()
            assert stats.kv_bytes + stats.adapter_bytes <= total
            if request.adapter == "a2":
                assert result.finish == finish
            else:
                assert result.tokens == alone(base, made[request.adapter], PROMPT, 4)[0]


def test_a_changed_adapter_is_new_for_new_requests_and_old_for_running_ones(base, tmp_path):
    made = adapter_folder(tmp_path, base, 1)
    other = trained(base.model, LoraConfig(rank=2, alpha=8), seed=9)
    engine = make_engine(base, tmp_path)
    engine.add_request(Request("old", PROMPT, "a0", max_tokens=8))
    events = engine.step() + engine.step()
    tensors = tmp_path / "a0" / "adapter_model.safetensors"
    save_adapter(other, tmp_path / "new")
    for file in (tmp_path / "new").iterdir():  # in place, as PEFT writes: a mapped file would change
        (tmp_path / "a0" / file.name).write_bytes(file.read_bytes())
    shutil.rmtree(tmp_path / "new")
    engine.pool.refresh()
    engine.add_request(Request("new", PROMPT, "a0", max_tokens=8))
    found = drained(engine)
    assert tokens_of([*events, *found["old"]]) == alone(base, made["a0"], PROMPT, 8)[0]
    assert tokens_of(found["new"]) == alone(base, other, PROMPT, 8)[0]
    assert engine.pool.bytes == size_of(engine.pool, "a0")  # the old one is gone from memory
    tensors.write_bytes(b"broken")
    engine.pool.refresh()
    with pytest.raises(UnknownAdapter, match="refused"):
        engine.add_request(Request("r", PROMPT, "a0"))


def test_unloading_lets_requests_go_on(base, tmp_path):
    made = adapter_folder(tmp_path, base, 2)
    engine = make_engine(base, tmp_path, slots=1)
    for name in ("running", "waiting"):
        engine.add_request(Request(name, PROMPT, "a0", max_tokens=5))
    events = engine.step()
    engine.pool.unload("a0")
    engine.pool.refresh()
    assert engine.pool.names() == ["a1"]
    with pytest.raises(UnknownAdapter):
        engine.add_request(Request("r", PROMPT, "a0"))
    found, wanted = drained(engine), alone(base, made["a0"], PROMPT, 5)[0]
    assert tokens_of([*events, *found["running"]]) == wanted == tokens_of(found["waiting"])
    assert engine.pool.bytes == 0
    engine.pool.load("a0", "a0")  # a path inside of the folder
    assert engine.generate([Request("r", PROMPT, "a0", max_tokens=5)])[0].tokens == wanted


def test_an_adapter_whose_files_vanish_fails_its_request_alone(base, tmp_path):
    made = adapter_folder(tmp_path, base, 2)
    engine = make_engine(base, tmp_path)
    engine.add_request(Request("gone", PROMPT, "a0", max_tokens=5))
    engine.add_request(Request("good", PROMPT, "a1", max_tokens=5))
    shutil.rmtree(tmp_path / "a0")
    found = drained(engine)
    assert found["gone"][-1].finish == "error"
    assert "no such folder" in found["gone"][-1].error
    assert tokens_of(found["good"]) == alone(base, made["a1"], PROMPT, 5)[0]


def test_nothing_outside_of_the_folder_is_loaded(base, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    adapter_folder(outside, base, 1)
    adapter_folder(inside, base, 1)
    (inside / "link").symlink_to(outside / "a0")
    shutil.copytree(inside / "a0", inside / "file")
    (inside / "file" / "adapter_model.safetensors").unlink()
    (inside / "file" / "adapter_model.safetensors").symlink_to(outside / "a0" / "adapter_model.safetensors")
    pool = AdapterPool(base, inside)
    assert pool.names() == ["a0"]
    assert all("not inside" in reason for reason in pool.refused().values())
    assert not any(str(tmp_path) in reason for reason in pool.refused().values())  # clients read it
    assert [*pool.refused()] == ["file", "link"]
    for path in (outside / "a0", "../outside/a0", "link", ".", inside, "a0/../../outside/a0", "file"):
        with pytest.raises(ConfigError, match="not inside"):
            pool.load("x", path)
    for name in ("", ".x", "a/b", "a\nb", "a0"):
        with pytest.raises(AdapterNameError):
            pool.load(name, "a0")
    with pytest.raises(OnebaseError):
        pool.load("x", "nothing")
    assert pool.load("x", inside / "a0").name == "x"
    assert AdapterPool(base).load("anywhere", outside / "a0").modules == 21


def test_the_slots_factors_grow_and_shrink_with_the_ranks(base, tmp_path):
    made = adapter_folder(tmp_path, base, 3)
    engine = Engine(base, AdapterPool(base, tmp_path), Limits(slots=2, context=32))
    sizes = []
    for name in ("a1", "a2", "a1"):  # of ranks 2, 8 and 2
        result = engine.generate([Request("r", PROMPT, name, max_tokens=3)])[0]
        assert result.tokens == alone(base, made[name], PROMPT, 3)[0]
        sizes.append(engine.stats().adapter_bytes - engine.pool.bytes)
    assert sizes[0] == sizes[2] == sizes[1] / 4
    assert torch.is_grad_enabled()


def sizes(thing, seen=None):
    """How many things each container holds that an object reaches through onebase's own attributes."""
    seen = {} if seen is None else seen
    if type(thing).__module__.startswith("onebase.") and not isinstance(thing, tuple):
        for name, value in vars(thing).items():
            if isinstance(value, Sized) and not isinstance(value, (str, torch.Tensor)):
                seen[f"{type(thing).__name__}.{name}"] = len(value)
            sizes(value, seen)
    return seen


def test_names_that_come_and_go_leave_nothing_behind(base, tmp_path):
    adapter_folder(tmp_path, base, 1)
    engine = make_engine(base, tmp_path)
    pool = engine.pool

    def one_comes_and_goes(number, kept=False):
        name = f"n{number}"
        pool.load(name, "a0")
        asked = [Request(f"plain{number}", PROMPT, name, max_tokens=1)]
        asked.append(Request(f"mixed{number}", PROMPT, mixture=((name, 1.0), ("a0", 0.5)), max_tokens=1))
        engine.generate(asked)
        assert engine.stats().requests[name] == 2
        if kept:  # its folder goes after its name
            shutil.copytree(tmp_path / "a0", tmp_path / f"f{number}")
            pool.refresh()
            pool.unload(f"f{number}")
            pool.refresh()
            assert f"f{number}" not in pool.names()
            shutil.rmtree(tmp_path / f"f{number}")
            pool.refresh()
        pool.unload(name)

    one_comes_and_goes(0, kept=True)
    before = sizes(engine)
    assert {"AdapterPool._known", "AdapterPool._hidden", "AdapterPool._served"} <= before.keys()
    for number in range(1, 200):
        one_comes_and_goes(number, kept=number % 20 == 0)
    assert sizes(engine) == before
    assert engine.stats().requests == {"": 0, "a0": 200}


def test_an_unloaded_name_of_the_folder_stays_hidden_until_its_folder_changes_or_goes(base, tmp_path):
    adapter_folder(tmp_path, base, 2)
    pool = AdapterPool(base, tmp_path)
    for name in ("a0", "a1"):
        pool.unload(name)
    pool.refresh()
    pool.refresh()
    assert pool.names() == []
    save_adapter(load_adapter(tmp_path / "a1", base), tmp_path / "a0", overwrite=True)
    pool.refresh()
    assert pool.names() == ["a0"]
    pool.load("a1", "a1")  # by name, and it lies in the folder under the same
    pool.unload("a1")
    pool.refresh()
    assert pool.names() == ["a0"]
    (tmp_path / "a1").rename(tmp_path / ".aside")
    pool.refresh()
    (tmp_path / ".aside").rename(tmp_path / "a1")
    pool.refresh()
    assert pool.names() == ["a0", "a1"]


def test_what_is_loaded_while_the_folder_is_looked_at_stays(base, tmp_path, monkeypatch):
    adapter_folder(tmp_path, base, 3)
    pool = AdapterPool(base, tmp_path)
    save_adapter(load_adapter(tmp_path / "a1", base), tmp_path / "a0", overwrite=True)
    shutil.rmtree(tmp_path / "a2")
    prove = pool._prove

    def meanwhile(*given, **more):
        monkeypatch.setattr(pool, "_prove", prove)
        pool.load("late", "a1")
        pool.load("a2", "a1", replace=True)
        return prove(*given, **more)

    monkeypatch.setattr(pool, "_prove", meanwhile)
    pool.refresh()
    assert pool.names() == ["a0", "a1", "a2", "late"]
