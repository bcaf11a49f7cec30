"""Adapters that come and go while the server runs; what may be loaded, and what is said of each."""

import shutil

import pytest
from prometheus_client.parser import text_string_to_metric_families

from onebase.serve.request import Stats
from onebase.web.metrics import MOST_LABELS, OTHERS, Metrics, Snapshot
from web import bare, greedy, running, speaking_folder

NASTY = "<script>alert(1)</script>"


def completion(client, model, prompt="Ada has"):
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    return client.post("/v1/completions", json=body)


@pytest.fixture
def changing(talkers, tmp_path):
    """A server whose folder changes; what lies outside of it, too."""
    base = talkers[0]
    (tmp_path / "in").mkdir()
    made = speaking_folder(tmp_path / "in", base, ("one", "two"))
    outside = speaking_folder(tmp_path / "out", base, ("secret",))
    with (
        running(base, tmp_path / "in", allow_runtime_loading=True, refresh=3600) as site,
        site.client() as client,
    ):
        yield site, client, tmp_path, made | outside


def load(client, name, path, **more):
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def unload(client, name):
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_what_is_said_of_an_adapter_is_what_inspect_says(site):
    with site.client() as client:
        body = client.get("/v1/adapters").json()
    assert body["base"] == {
        "id": "tiny",
        "parameters": site.service.base.parameters,
        "context": 128,
        "chat": True,
    }
    assert (body["runtime_loading"], body["refused"], body["loadable"]) == (False, [], [])
    by_name = {one["id"]: one for one in body["data"]}
    assert [*by_name] == ["chatty", "foreign", "plain"]
    one = by_name["plain"]
    assert (one["rank"], one["alpha"], one["modules"], one["parameters"]) == (3, 8.0, 14, 2784)
    assert one["bytes"] == 4 * one["parameters"]
    assert one["targets"] == sorted({*"q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()})
    assert one["prompt"] == {"chat": False, "system": "", "separator": " ->"}
    assert one["training"] == {"steps": 7, "tokens": 90, "rows": 5, "loss": 1.5, "data": "rows.jsonl"}
    assert (by_name["foreign"]["prompt"], by_name["foreign"]["training"]) == ({}, {})


def test_an_adapter_that_appears_is_found_when_it_is_asked_for(changing):
    site, client, place, made = changing
    assert completion(client, "secret").status_code == 404
    shutil.copytree(place / "out" / "secret", place / "in" / "secret")
    answer = completion(client, "secret")
    wanted = greedy(
        site.service.base, made["secret"], site.service.base.tokenizer("Ada has")["input_ids"], 8
    )[1]
    assert bare(answer.json()["choices"][0]["text"]) == wanted
    shutil.rmtree(place / "in" / "one")
    shutil.copytree(place / "out" / "secret", place / "in" / "later")
    assert completion(client, "later").status_code == 200  # the same look finds what is gone
    assert completion(client, "one").status_code == 404


def test_the_folder_is_looked_at_without_being_asked_too(talkers, tmp_path):
    base = talkers[0]
    speaking_folder(tmp_path / "out", base, ("late",))
    (tmp_path / "in").mkdir()
    with running(base, tmp_path / "in", refresh=0.05) as site, site.client() as client:
        shutil.copytree(tmp_path / "out" / "late", tmp_path / "in" / "late")
        site.wait_until(lambda _: len(client.get("/v1/models").json()["data"]) == 2)


def test_a_broken_adapter_is_refused_with_the_reason_and_the_rest_go_on(changing):
    _, client, place, _ = changing
    for name in ("broken", NASTY.replace("/", "")):
        shutil.copytree(place / "out" / "secret", place / "in" / name)
    (place / "in" / "broken" / "adapter_model.safetensors").write_bytes(b"\xff" * 50)
    loop = place / "in" / "loop"
    loop.mkdir()
    shutil.copy(place / "out" / "secret" / "adapter_config.json", loop)
    (loop / "adapter_model.safetensors").symlink_to(loop / "adapter_model.safetensors")
    answer = completion(client, "broken")
    assert answer.status_code == 404
    assert "refused" in answer.json()["error"]["message"]
    body = client.get("/v1/adapters").json()
    assert [one["id"] for one in body["refused"]] == ["broken", "loop"]
    assert all(one["reason"] for one in body["refused"])
    assert completion(client, "two").status_code == 200
    text = client.get("/metrics").text
    assert "onebase_adapters_refused 2.0" in text
    assert 'onebase_adapter_refused{adapter="broken",reason="' in text


def test_an_adapter_may_have_any_name_that_a_folder_has(changing):
    _, client, place, _ = changing
    name = NASTY.replace("/", "")
    shutil.copytree(place / "out" / "secret", place / "in" / name)
    assert completion(client, name).status_code == 200
    listed = client.get("/v1/adapters")
    assert listed.headers["content-type"] == "application/json"
    assert name in [one["id"] for one in listed.json()["data"]]
    assert f'model="{name}"' in client.get("/metrics").text
    missing = completion(client, NASTY)
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/json")


def test_one_with_the_bases_name_does_not_stand_in_for_it(changing):
    site, client, place, _ = changing
    plain = completion(client, "tiny").json()["choices"]
    shutil.copytree(place / "out" / "secret", place / "in" / "tiny")
    site.service.pool.refresh()
    assert completion(client, "tiny").json()["choices"] == plain
    assert client.get("/v1/adapters").json()["refused"] == [
        {"id": "tiny", "reason": "it has the base's name"}
    ]
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny", "one", "two"]


def test_loading_and_unloading_speak_as_vllm_does(changing):
    site, client, place, made = changing
    shutil.copytree(place / "out" / "secret", place / "in" / "deep" / "secret")
    answer = load(client, "alias", "deep/secret")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'alias' added successfully.")
    wanted = greedy(
        site.service.base, made["secret"], site.service.base.tokenizer("Ada has")["input_ids"], 8
    )[1]
    assert bare(completion(client, "alias").json()["choices"][0]["text"]) == wanted
    again = load(client, "alias", "one")
    assert (again.status_code, again.json()["error"]["type"]) == (400, "InvalidUserInput")
    assert "'alias' has already been loaded" in again.json()["error"]["message"]
    assert load(client, "alias", "one", load_inplace=True).status_code == 200
    assert completion(client, "alias").json()["choices"] == completion(client, "one").json()["choices"]
    gone = unload(client, "alias")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'alias' removed successfully.")
    missing = unload(client, "alias")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")
    assert missing.json()["error"]["message"] == "The lora adapter 'alias' cannot be found."
    assert completion(client, "alias").status_code == 404
    assert "'lora_name' and 'lora_path'" in load(client, "", "one").json()["error"]["message"]
    none = load(client, "new", "nowhere")
    assert (none.status_code, none.json()["error"]["code"]) == (404, 404)
    assert none.json()["error"]["message"] == "Loading lora new failed: No adapter found for nowhere"
    assert client.post("/v1/load_lora_adapter", json={"lora_path": "one"}).status_code == 400


def test_an_unloaded_adapter_stays_away_until_it_is_loaded_again(changing):
    _, client, _, _ = changing
    assert unload(client, "one").status_code == 200
    assert completion(client, "one").status_code == 404
    assert client.get("/v1/adapters").json()["loadable"] == ["one"]
    assert load(client, "one", "one").status_code == 200
    assert completion(client, "one").status_code == 200


def test_nothing_outside_of_the_folder_is_loaded(changing):
    _, client, place, _ = changing
    inside, outside = place / "in", place / "out" / "secret"
    (inside / "link").symlink_to(outside)
    shutil.copytree(outside, inside / "half")
    (inside / "half" / "adapter_model.safetensors").unlink()
    (inside / "half" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    ways = [
        "../out/secret",
        outside,
        "one/../../out/secret",
        "link",
        "half",
        "..",
        ".",
        "",
        "/",
        "/etc/passwd",
    ]
    for path in [*ways, "a\0b", "x" * 5000, "~", "file:///etc"]:
        answer = load(client, "way", path)
        assert answer.status_code in (400, 404), path
        assert answer.json()["error"]["type"] in ("InvalidUserInput", "NotFoundError")
    for name in ("../one", "a/b", ".hidden", "line\nbreak", "tiny"):
        assert load(client, name, "one").status_code == 400
    assert load(client, "whole", inside / "one").status_code == 200  # absolute, and inside
    names = [one["id"] for one in client.get("/v1/models").json()["data"]]
    assert names == ["tiny", "one", "two", "whole"]
    assert {one["id"] for one in client.get("/v1/adapters").json()["refused"]} <= {"link", "half"}


def test_loading_is_off_unless_asked_for(site):
    with site.client() as client:
        for answer in (load(client, "new", "plain"), unload(client, "plain")):
            assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
        assert completion(client, "plain").status_code == 200


def test_the_page_and_its_policy(site):
    with site.client() as client:
        page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"


def test_metrics_are_prometheus_own_form_and_count_what_happened(talkers):
    base, folder, _ = talkers
    with running(base, folder) as site, site.client() as client:
        for model in ("plain", "plain", "tiny", "nobody", "no\nbody"):
            completion(client, model)
        mixed = {"model": "tiny", "prompt": "a", "max_tokens": 2, "mixture": {"plain": 1.0, "foreign": 1.0}}
        client.post("/v1/completions", json=mixed)
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "finish")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert found["onebase_requests_total", "plain"] == 2
    assert found["onebase_requests_total", "tiny"] == 1
    assert found["onebase_requests_total", "(mixture)"] == 1
    assert found["onebase_http_errors_total", "404"] == 2
    assert found["onebase_first_token_seconds_count",] == 4
    assert found["onebase_request_seconds_count",] == 4
    assert found["onebase_token_seconds_count",] == found["onebase_generated_tokens_total",] - 4
    assert found["onebase_requests_running",] == found["onebase_requests_waiting",] == 0
    assert found["onebase_adapters",] == 3
    assert found["onebase_adapter_loads_total",] + found["onebase_adapter_hits_total",] == 4
    assert not any("nobody" in key for key in found)


def test_labels_are_bounded_and_hold_any_name():
    metrics = Metrics()
    labels = {metrics.label(f"a{n}") for n in range(MOST_LABELS + 50)}
    assert len(labels) == MOST_LABELS + 1
    assert metrics.label("a0") == "a0"
    assert metrics.label("another") == OTHERS
    refused = {f"r{n}": 'a "reason"\n\udcff' * 1000 for n in range(500)}
    text = metrics.render(Snapshot(Stats(0, 0, 0, 0), 1, refused)).decode()
    (family,) = [f for f in text_string_to_metric_families(text) if f.name == "onebase_adapter_refused"]
    assert len(family.samples) == 50
    assert all(len(sample.labels["reason"]) == 200 for sample in family.samples)
    assert len(text) < 40_000
