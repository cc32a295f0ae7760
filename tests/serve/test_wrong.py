"""Whatever clients and administrators do wrong, they hear what and with which status, and the server goes on."""

from __future__ import annotations

import json
import shutil
import socket
import time

import openai
import pytest

from inlay.methods.bottleneck import Bottleneck
from tests.serve import tiny_server
from tests.serve.tiny_server import ADMIN, wait

CHAT = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
TEXT = {"model": "base", "prompt": "x", "max_tokens": 2}


@pytest.fixture(autouse=True)
def unharmed(request):
    """After every test the server answers, and nobody is left in its batch."""
    yield
    if "served" in request.fixturenames:
        served = request.getfixturevalue("served")
        assert served.client().completions.create(**TEXT).choices[0].finish_reason
        wait(lambda: served.batcher.jobs == 0)
        assert all(
            a.get("requests", 0) == 0 for a in served.http("GET", "/admin/adapters", headers=ADMIN).json()["adapters"]
        )


@pytest.mark.parametrize(
    "path, body, status, param",
    [
        ("completions", TEXT | {"model": "nobody"}, 404, "model"),
        ("completions", TEXT | {"model": "../adapters/lora"}, 404, "model"),
        ("completions", TEXT | {"model": "lora+base"}, 404, "model"),
        ("completions", TEXT | {"model": "lora+lora"}, 400, "model"),
        ("completions", TEXT | {"model": "lora+"}, 404, "model"),
        ("completions", TEXT | {"model": ""}, 404, "model"),
        ("completions", TEXT | {"model": 3}, 400, "model"),
        ("completions", {"model": "base"}, 400, "prompt"),
        ("completions", TEXT | {"prompt": "y" * 128}, 400, "messages"),
        ("completions", TEXT | {"prompt": []}, 400, None),
        ("completions", TEXT | {"prompt": [10**6]}, 400, "prompt"),
        ("completions", TEXT | {"prompt": [-1]}, 400, "prompt"),
        ("completions", TEXT | {"max_tokens": 0}, 400, "max_tokens"),
        ("completions", TEXT | {"n": 0}, 400, "n"),
        ("completions", TEXT | {"prompt": ["a"] * 100, "n": 100}, 400, "n"),
        ("completions", TEXT | {"temperature": -1}, 400, "temperature"),
        ("completions", TEXT | {"temperature": "hot"}, 400, "temperature"),
        ("completions", TEXT | {"top_p": 0}, 400, "top_p"),
        ("completions", TEXT | {"stop": [""]}, 400, "stop.0"),
        ("completions", TEXT | {"stop": "a</s>"}, 400, "stop"),
        ("chat/completions", CHAT | {"stop": ["x", "</s>\n"]}, 400, "stop"),
        ("completions", TEXT | {"timeout": 0}, 400, "timeout"),
        ("completions", TEXT | {"best_of": 3}, 400, None),
        ("completions", TEXT | {"suffix": "!"}, 400, "suffix"),
        ("completions", TEXT | {"presence_penalty": 0.5}, 400, "presence_penalty"),
        ("completions", TEXT | {"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages"),
        ("chat/completions", CHAT | {"messages": "hi"}, 400, "messages"),
        ("chat/completions", CHAT | {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ("chat/completions", CHAT | {"tools": [{}]}, 400, "tools"),
        ("chat/completions", CHAT | {"top_logprobs": 2}, 400, None),
        ("chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format.type"),
        ("chat/completions", [1, 2], 400, None),
        ("chat/completions", None, 400, None),
    ],
)
def test_what_is_wrong_is_said_in_openais_shape(served, path, body, status, param):
    got = served.http("POST", f"/v1/{path}", json=body)
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert got.headers["x-should-retry"] == "false"


def test_nulls_and_defaults_are_fine(served):
    nothing = {"stop": None, "seed": None, "n": None, "logprobs": None, "user": None, "logit_bias": {}, "top_p": 1}
    assert served.http("POST", "/v1/completions", json=TEXT | nothing | {"presence_penalty": 0}).status_code == 200
    assert served.http("POST", "/v1/completions", json=TEXT | {"temperature": 0, "top_p": 0.5}).status_code == 200


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"model": "base"', b"[" * 5000])
def test_malformed_json(served, body):
    got = served.http("POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    error = got.json()["error"]
    assert (got.status_code, error["type"], error["param"]) == (400, "invalid_request_error", None)
    assert "JSON" in error["message"]


def test_where_json_breaks_and_what_is_no_json_is_told(served):
    def told(**more):
        return served.http("POST", "/v1/completions", **more).json()["error"]["message"]

    json_type = {"content-type": "application/json"}
    broken = told(content=b'{"model": "base", ', headers=json_type)
    assert broken.startswith("the body is not JSON, from character 18 on")
    wanted = "the body must be a JSON object, sent with the header Content-Type: application/json"
    fine = json.dumps(TEXT).encode()
    assert [told(), told(content=fine), told(content=fine, headers={"content-type": "text/plain"})] == [wanted] * 3
    assert told(json=[1]) == wanted


def test_a_composition_that_cannot_be_made_is_told_in_the_names_that_were_asked_for(served):
    got = served.http("POST", "/v1/completions", json=TEXT | {"model": "union(lora, series)"})
    assert got.status_code == 400 and "'lora' is 'lora'" in got.json()["error"]["message"]


def test_a_path_that_is_none_is_answered_with_those_there_are(served):
    got = served.http("POST", "/chat/completions", json=CHAT)
    assert got.status_code == 404 and "/v1/chat/completions" in got.json()["error"]["message"]


def test_without_an_admin_key_it_is_told_how_to_give_one(root):
    with tiny_server.inside(root, admin_key=None) as served:
        assert "INLAY_ADMIN_KEY" in served.http("GET", "/admin/adapters").json()["error"]["message"]


def test_the_client_raises_its_own_errors(served):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        served.client().completions.create(**TEXT | {"model": "nobody"})
    with pytest.raises(openai.BadRequestError, match="shorten the prompt") as e:
        served.client().completions.create(**TEXT | {"prompt": "y" * 300})
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("nobody")


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/..%2F..%2Fetc", 404),
    ("GET", "/", 404), ("PATCH", "/admin/adapters", 401),
])  # fmt: skip
def test_unknown_paths(served, method, path, status):
    got = served.http(method, path)
    assert got.status_code == status and got.json()["error"]["message"]


def test_bodies_have_a_limit(root):
    with tiny_server.inside(root, body=1000) as served:
        for content in (b"x" * 2000, (b"x" * 100 for _ in range(20))):  # with its length told, and in chunks
            got = served.http("POST", "/v1/completions", content=content, headers={"content-type": "application/json"})
            assert got.status_code == 413 and "1000 bytes" in got.json()["error"]["message"]
        assert served.http("POST", "/v1/completions", json=TEXT).status_code == 200


def test_keys(root):
    with tiny_server.inside(root, api_key="guest") as served:
        assert served.http("GET", "/v1/models").status_code == 401
        assert served.http("GET", "/v1/models", headers=ADMIN).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            served.client(api_key="wrong").models.list()
        assert served.client(api_key="guest").models.list().data
        guest = {"Authorization": "Bearer guest"}
        assert served.http("DELETE", "/admin/adapters/lora", headers=guest).status_code == 401
        assert served.http("GET", "/admin/adapters", headers=ADMIN).status_code == 200
        for path in ("/health", "/ready", "/metrics"):
            assert served.http("GET", path).status_code == 200
    with tiny_server.inside(root, admin_key=None) as served:
        assert served.http("GET", "/admin/adapters", headers=ADMIN).status_code == 403


def test_adapters_are_loaded_replaced_and_unloaded(root, tmp_path):
    folder = shutil.copytree(root / "adapters", tmp_path / "adapters")
    shutil.copytree(root / "spare", folder / "more")
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter.json").write_text("{}")
    with tiny_server.inside(root, adapters=(str(folder),)) as served:

        def admin(method, name, source=None, key=ADMIN):
            return served.http(method, f"/admin/adapters/{name}", headers=key, json=source and {"source": source})

        def says(name):
            asked = {"model": name, "prompt": "Tom", "max_tokens": 12, "temperature": 0}
            return served.client().completions.create(**asked).choices[0].text

        was, series = says("lora"), says("series")
        assert admin("POST", "lora").status_code == 409
        assert admin("POST", "new", "more/lora").status_code == 201
        assert says("new") != was and "new" in [m.id for m in served.client().models.list()]
        assert admin("PUT", "lora", "more/lora").status_code == 200 and says("lora") == says("new")
        assert admin("PUT", "lora", "lora").status_code == 200 and says("lora") == was
        assert admin("DELETE", "new").json() == {"name": "new", "deleted": True}
        assert admin("DELETE", "new").status_code == 404
        with pytest.raises(openai.NotFoundError):
            says("new")
        assert "GET /admin/adapters" in admin("DELETE", "new").json()["error"]["message"]
        assert "Hub" in (hub := admin("POST", "x", "hub:org/nothing").json()["error"]["message"]) and "\n" not in hub
        for name, source, status in (
            ("..%2Fup", None, 400), ("%2e%2e", None, 400), ("x", "../base", 400), ("x", "/etc", 400),
            ("x", "broken", 422), ("base", "lora", 409), ("a+b", "lora", 400), ("x", "hub:org/nothing", 422),
        ):  # fmt: skip
            got = admin("POST", name, source)
            assert got.status_code == status, (name, source, got.text)
        assert served.http("POST", "/admin/adapters/y", headers=ADMIN, json={"path": "lora"}).status_code == 400
        with pytest.raises(openai.InternalServerError) as e:
            says("broken")
        assert e.value.status_code == 500 and e.value.code == "adapter_broken"
        assert (says("lora"), says("series")) == (was, series)
        assert served.metric('inlay_adapter_changes_total{what="refused"}') >= 8


def test_an_adapter_that_failed_is_refused_until_it_is_loaded_anew(root, monkeypatch):
    with tiny_server.inside(root) as served:

        def ask(model):
            return served.http("POST", "/v1/completions", json=TEXT | {"model": model})

        assert ask("series").status_code == 200
        with monkeypatch.context() as m:
            m.setattr(Bottleneck, "after", None)
            assert ask("series").json()["error"]["code"] == "model_failed"
        for model in ("series", "lora+series"):
            got = ask(model)
            error = got.json()["error"]
            assert (got.status_code, error["code"], got.headers["x-should-retry"]) == (500, "adapter_broken", "false")
            assert "'series'" in error["message"] and "PUT /admin/adapters" in error["message"]
        assert ask("lora").status_code == 200
        listed = served.http("GET", "/admin/adapters", headers=ADMIN).json()["adapters"]
        assert [(a["name"], "TypeError" in a["error"]) for a in listed if a["state"] == "broken"] == [("series", True)]
        assert served.metric("inlay_adapters_broken") == 1 == served.metric('inlay_rows_ended_total{how="failed"}')
        assert served.http("PUT", "/admin/adapters/series", headers=ADMIN).status_code == 200
        assert ask("series").status_code == 200 and served.metric("inlay_adapters_broken") == 0


def endless(served):
    """Nothing ends by itself before its limit."""
    served.batcher._running.ends.clear()
    return {"model": "lora", "prompt": "x", "max_tokens": 100, "temperature": 0}


def slow(served, seconds):
    """Each step takes so long."""
    return served.batcher.host.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def test_a_client_that_leaves_frees_its_rows(root):
    with tiny_server.inside(root) as served:
        asked, hook = endless(served), slow(served, 0.03)
        stream = served.client().completions.create(**asked, stream=True)
        next(iter(stream))
        assert served.batcher.jobs == 1
        stream.close()
        wait(lambda: served.batcher.jobs == 0, 2)

        body = json.dumps(asked | {"n": 3}).encode()
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as s:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
                      + str(len(body)).encode() + b"\r\n\r\n" + body)  # fmt: skip
            wait(lambda: served.batcher.jobs == 3)
        wait(lambda: served.batcher.jobs == 0, 2)
        assert served.metric('inlay_rows_ended_total{how="cancelled"}') == 4
        assert served.metric('inlay_requests_total{path="/v1/completions",status="499"}') == 1
        hook.remove()
        assert served.client().completions.create(**asked).usage.completion_tokens == 100


def test_deadlines(root):
    with tiny_server.inside(root) as served:
        asked, hook = endless(served), slow(served, 0.05)
        with pytest.raises(openai.InternalServerError) as e:
            served.client(max_retries=3).completions.create(**asked, extra_body={"timeout": 0.3})
        assert e.value.status_code == 504 and e.value.code == "timeout"
        assert served.metric('inlay_rows_ended_total{how="expired"}') == 1, "a deadline must not be retried"
        got = []
        with pytest.raises(openai.APIError, match="time is over"):
            for part in served.client().completions.create(**asked, stream=True, extra_body={"timeout": 0.5}):
                got.append(part)
        assert 1 < len(got) < 100 and served.batcher.jobs == 0
        hook.remove()


def test_a_full_queue_is_429_and_the_client_comes_again(root):
    with tiny_server.inside(root, rows=1, waiting=1) as served:
        asked, hook = endless(served), slow(served, 0.05)
        first = served.client().completions.create(**asked, stream=True)
        second = served.client().completions.create(**asked, stream=True)
        got = served.http("POST", "/v1/completions", json=asked)
        assert got.status_code == 429 and got.json()["error"]["type"] == "rate_limit_error"
        assert int(got.headers["retry-after"]) >= 1 and got.headers["x-should-retry"] == "true"
        assert served.http("POST", "/v1/completions", json=asked | {"n": 3}).status_code == 400
        first.close()
        second.close()
        hook.remove()
        assert served.client(max_retries=5).completions.create(**asked).usage.completion_tokens == 100


def test_a_request_given_up_while_its_adapter_is_read_holds_nothing(root):
    import asyncio

    from inlay.serve.wire import CompletionRequest

    with tiny_server.inside(root) as served:
        service, adapters = served.app.state.service, served.batcher.adapters
        bring = adapters.bring
        adapters.bring = lambda model: (time.sleep(0.3), bring(model))[1]

        async def give_up():
            task = asyncio.ensure_future(service.complete(CompletionRequest(**TEXT | {"model": "lora"})))
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(give_up())
        wait(lambda: adapters.loaded == 1)
        wait(lambda: adapters.describe()[0]["requests"] == 0)
        assert served.batcher.jobs == 0


# ---- fields that change nothing --------------------------------------------------------------------------------------
def test_fields_that_change_nothing_are_taken(served):
    """By their value, or since nothing here could be changed: clients send them by default, and get the same answer."""
    from inlay.serve.wire import LABELS, NEUTRAL

    with_values = [{k: v} for k, values in NEUTRAL.items() for v in values] + [{k: "x"} for k in LABELS]
    with_values += [{"logprobs": False, "top_logprobs": 0}]
    want = served.http("POST", "/v1/chat/completions", json=CHAT | {"temperature": 0}).json()["choices"]
    for more in with_values:
        got = served.http("POST", "/v1/chat/completions", json=CHAT | {"temperature": 0} | more)
        assert got.status_code == 200 and got.json()["choices"] == want, (more, got.text)


@pytest.mark.parametrize(
    "more",
    [
        *({"min_p": 0.1}, {"repetition_penalty": 1.1}, {"top_k": -2}, {"functions": [{}]}, {"tool_choice": "required"}),
        *({"ignore_eos": True}, {"min_tokens": 1}, {"best_of": 2}, {"modalities": ["audio"]}, {"service_tier": "flex"}),
        *(
            {"use_beam_search": True},
            {"skip_special_tokens": False},
            {"add_generation_prompt": False},
            {"min_p": False},
        ),
    ],
    ids=str,
)
def test_the_same_fields_with_a_meaning_are_refused(served, more):
    got = served.http("POST", "/v1/chat/completions", json=CHAT | more)
    assert got.status_code == 400 and next(iter(more)) in got.text


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-38, 9e-5])
def test_a_temperature_near_zero_is_greedy_and_hurts_nobody(served, temperature):
    cold = served.http("POST", "/v1/completions", json=TEXT | {"temperature": temperature, "top_p": 0.5, "top_k": 3})
    greedy = served.http("POST", "/v1/completions", json=TEXT | {"temperature": 0})
    assert cold.status_code == 200 and cold.json()["choices"] == greedy.json()["choices"]
