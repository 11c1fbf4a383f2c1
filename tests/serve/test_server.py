"""The server: OpenAI's API by OpenAI's own client, and what else clients may send it.

Truth: `generate` with the same settings, alone; the prompts of messages by transformers' `apply_chat_template`.
"""

import dataclasses
import json
import socket
import time

import httpx
import numpy as np
import openai
import pytest

from kangaroo_jax import SamplingConfig
from tests.bench.models import small_chat_target
from tests.serve.servers import MODEL, alone, check_alive, wait_for

PROMPT = "def add(self, item):"
MESSAGES = [{"role": "user", "content": PROMPT}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 24}
LONG = {"prompt": PROMPT, "temperature": 0, "max_tokens": 100, "ignore_eos": True}
DEPTH = 40_000


def chat_ids(messages):
    options = {"add_generation_prompt": True, "return_dict": False}
    return tuple(small_chat_target().tokenizer.apply_chat_template(messages, **options))


def text_of(stream):
    return "".join(choice.text for chunk in stream for choice in chunk.choices)


def test_a_completion_is_generates(served):
    answer = served.openai.completions.create(prompt=PROMPT, **GREEDY)
    truth = alone(PROMPT)
    assert answer.choices[0].text == truth.texts[0]
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == MODEL
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1 + len(PROMPT), 24)
    assert answer.usage.total_tokens == 25 + len(PROMPT)
    own = answer.usage.kangaroo
    assert own["rounds"] == len(truth.accept_lengths[0])
    assert own["accept_length"] == pytest.approx(truth.mean_accept_length, abs=1e-4)


def test_a_chat_takes_the_template(served):
    answer = served.openai.chat.completions.create(messages=MESSAGES, **GREEDY)
    truth = alone(chat_ids(MESSAGES))
    assert answer.choices[0].message.content == truth.texts[0]
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(chat_ids(MESSAGES))
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT[:5]}, {"type": "text", "text": PROMPT[5:]}]}]
    again = served.openai.chat.completions.create(messages=parts, **GREEDY)
    assert again.choices[0].message.content == truth.texts[0]


def test_a_stream_has_the_same_text_and_then_the_usage(served):
    stream = list(
        served.openai.chat.completions.create(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert stream[0].choices[0].delta.role == "assistant"
    assert len(stream) > 3
    text = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
    assert text == alone(chat_ids(MESSAGES)).texts[0]
    reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert not stream[-1].choices
    assert stream[-1].usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in stream[:-1])
    raw = served.post("completions", prompt=PROMPT, stream=True, **GREEDY)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("\n\ndata: [DONE]\n\n")
    assert "usage" not in raw.text


def test_three_answers_have_seeds_of_their_own(served):
    settings = {"prompt": PROMPT, "model": MODEL, "n": 3, "max_tokens": 24, "temperature": 0.9, "top_p": 0.95}
    answer = served.openai.completions.create(seed=2**32 - 2, **settings)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice, seed in zip(answer.choices, (2**32 - 2, 2**32 - 1, 0), strict=True):
        assert choice.text == alone(PROMPT, sampling=SamplingConfig(0.9, 0.95, seed=seed)).texts[0]
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 72
    assert answer.usage.prompt_tokens == 1 + len(PROMPT)
    texts = ["", "", ""]
    for chunk in served.openai.completions.create(seed=2**32 - 2, stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def test_without_a_temperature_answers_are_drawn(served):
    first, second = (
        served.openai.completions.create(prompt=PROMPT, model=MODEL, max_tokens=24, seed=seed) for seed in (5, 6)
    )
    assert first.choices[0].text == alone(PROMPT, sampling=SamplingConfig(1.0, seed=5)).texts[0]
    assert first.choices[0].text != second.choices[0].text
    unseeded = {served.post("completions", prompt=PROMPT, max_tokens=24).json()["choices"][0]["text"] for _ in range(2)}
    assert len(unseeded) == 2


@pytest.mark.parametrize("several", [False, True])
def test_a_stop_string_ends_the_answer_before_it(served, several):
    stop = alone(PROMPT).texts[0][12:15]
    stop = ["not there", stop] if several else stop
    answer = served.openai.completions.create(prompt=PROMPT, stop=stop, **GREEDY)
    strings = [stop] if isinstance(stop, str) else stop
    truth = alone(PROMPT, stop=tuple(strings))
    assert answer.choices[0].text == truth.texts[0]
    assert not any(string in answer.choices[0].text for string in strings)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(truth.tokens[0]) < 24
    stream = served.openai.completions.create(prompt=PROMPT, stop=stop, stream=True, **GREEDY)
    assert text_of(stream) == truth.texts[0]


def test_eos_ends_an_answer_unless_ignored(served, monkeypatch):
    engine = served.server._thread._engines[False]
    ending = alone(PROMPT).tokens[0][9]
    monkeypatch.setattr(engine, "target", dataclasses.replace(engine.target, eos_token_ids=(ending,)))
    answer = served.openai.completions.create(prompt=PROMPT, **GREEDY)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == alone(PROMPT, eos=(ending,)).texts[0]
    assert answer.usage.completion_tokens <= 10
    answer = served.openai.completions.create(prompt=PROMPT, extra_body={"ignore_eos": True}, **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (alone(PROMPT).texts[0], "length")


def test_several_prompts_and_token_ids(served):
    ids = small_chat_target().tokenizer.encode(PROMPT)
    answer = served.openai.completions.create(prompt=[PROMPT, "class Stack:"], **GREEDY)
    assert [choice.text for choice in answer.choices] == [alone(PROMPT).texts[0], alone("class Stack:").texts[0]]
    answer = served.openai.completions.create(prompt=ids, **GREEDY)
    assert answer.choices[0].text == alone(PROMPT).texts[0]


@pytest.mark.long
def test_a_conversation_goes_on_from_what_a_slot_holds(served):
    first = "x = [1, 2, 3]\n" * 6
    messages = [{"role": "user", "content": first}]
    answer = served.openai.chat.completions.create(messages=messages, **GREEDY)
    messages += [{"role": "assistant", "content": answer.choices[0].message.content}, {"role": "user", "content": "y"}]
    answer = served.openai.chat.completions.create(messages=messages, **GREEDY)
    assert answer.usage.prompt_tokens_details.cached_tokens > 60
    assert answer.choices[0].message.content == alone(chat_ids(messages)).texts[0]


@pytest.mark.long
def test_drafts_and_plain_decoding_for_the_page(served):
    body = {"prompt": PROMPT, "stream": True, "kangaroo": {"drafts": True}, **GREEDY}
    lines = served.post("completions", **body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    spans = [span for chunk in chunks for span in chunk["kangaroo"]["spans"]]
    assert "".join(text for kind, text, _ in spans if kind != "rejected") == alone(PROMPT).texts[0]
    kinds = {kind for kind, _, _ in spans}
    assert kinds == {"accepted", "rejected", "target"}
    plain = served.post("completions", prompt=PROMPT, kangaroo={"plain": True}, **GREEDY).json()
    assert plain["choices"][0]["text"] == alone(PROMPT).texts[0]
    assert plain["usage"]["kangaroo"]["rounds"] == 23
    assert plain["usage"]["kangaroo"]["accept_length"] == 1


def test_models(served):
    assert [model.id for model in served.openai.models.list()] == [MODEL]
    assert served.openai.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("gpt-7")


WRONG = [
    ({"logprobs": 3}, "unsupported_parameter", "logprobs"),
    ({"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
    ({"presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty"),
    ({"best_of": 2}, "unsupported_parameter", "best_of"),
    ({"echo": True}, "unsupported_parameter", "echo"),
    ({"temprature": 1}, "unknown_parameter", "temprature"),
    ({"kangaroo": {"gamma": 3}}, "unknown_parameter", "kangaroo"),
    ({"kangaroo": {"drafts": True}}, "invalid_value", "kangaroo"),
    ({"temperature": -1}, "invalid_value", "temperature"),
    ({"temperature": "hot"}, "invalid_value", "temperature"),
    ({"temperature": 10**400}, "invalid_value", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"top_k": 1.5}, "invalid_value", "top_k"),
    ({"seed": -1}, "invalid_value", "seed"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 1000}, "invalid_value", "n"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": True}, "invalid_value", "max_tokens"),
    ({"stop": [""]}, "invalid_value", "stop"),
    ({"stop": ["x"] * 17}, "invalid_value", "stop"),
    ({"stream": "yes"}, "invalid_value", "stream"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({"prompt": ""}, "invalid_value", "prompt"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"prompt": [100]}, "invalid_value", "prompt"),
    ({"prompt": [True]}, "invalid_value", "prompt"),
    ({"prompt": "a \ud800"}, "invalid_value", "prompt"),
    ({"prompt": "x = 1\n" * 200}, "context_length_exceeded", "prompt"),
    ({"max_tokens": 760}, "context_length_exceeded", "prompt"),
    ({"model": "gpt-7"}, "model_not_found", "model"),
]


@pytest.mark.parametrize(("change", "code", "param"), WRONG)
def test_what_is_wrong_or_not_supported_is_refused_by_name(served, change, code, param):
    response = served.http.post(
        "/v1/completions",
        content=json.dumps({"prompt": PROMPT} | change),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == (404 if code == "model_not_found" else 400)
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert "\n" not in error["message"]
    assert served.server._thread.active == 0


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], "messages must be a list"),
        ("hi", "messages must be a list"),
        ([{"role": "user"}], "messages[0] must have a role and a text"),
        ([{"role": "wizard", "content": "x"}], "unknown role 'wizard'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls is not supported"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "the last message"),
        ([{"role": "user", "content": "x"}] * 1001, "at most 1000"),
    ],
)
def test_messages_that_cannot_be_answered(served, messages, found):
    with pytest.raises(openai.BadRequestError) as error:
        served.openai.chat.completions.create(messages=messages, **GREEDY)
    assert found in error.value.message
    assert error.value.param == "messages"


def test_values_that_ask_for_nothing_are_taken(served):
    neutral = {"presence_penalty": 0, "logit_bias": {}, "logprobs": False, "tools": [], "user": "me", "seed": None}
    response = served.post("chat/completions", messages=MESSAGES, **GREEDY, **neutral)
    assert response.json()["choices"][0]["message"]["content"] == alone(chat_ids(MESSAGES)).texts[0]
    response = served.post("chat/completions", messages=MESSAGES, tools=[{"type": "function"}])
    assert response.json()["error"]["param"] == "tools"
    response = served.post("chat/completions", messages=MESSAGES, max_tokens=1, max_completion_tokens=1)
    assert response.json()["error"]["param"] == "max_completion_tokens"


# --- What clients may do to a server: leave, send garbage, ask for too much at a time.


@pytest.fixture
def slow(served, monkeypatch):
    """Steps that take long, so that what comes in between does."""
    engine = served.server._thread._engines[False]
    step = engine.step

    def slowly():
        time.sleep(0.15)
        return step()

    monkeypatch.setattr(engine, "step", slowly)
    return engine


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe{}", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'"text"', 400, "invalid_json"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "invalid_value"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b"[" * DEPTH, 400, "invalid_json"),
        (b'{"prompt": ' + b"[" * DEPTH + b"]" * DEPTH + b"}", 400, "invalid_json"),
        (b'{"prompt": "' + b"x" * 200_000 + b'"}', 413, "body_too_large"),
        (b"x" * 10_000_000, 413, "body_too_large"),
    ],
    ids=lambda value: f"{value[:12]}" if isinstance(value, bytes) else "",
)
def test_garbage_bodies(served, body, status, code):
    response = served.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "Traceback" not in response.text
    assert "kangaroo_jax" not in response.text
    check_alive(served)


def test_other_content_types_paths_and_methods(served):
    body = json.dumps({"prompt": PROMPT})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        headers = {} if kind is None else {"Content-Type": kind}
        response = served.http.post("/v1/completions", content=body, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
    for method, path, status in (("GET", "/v1/embeddings", 404), ("GET", "/../etc/passwd", 404), ("PUT", "/", 405)):
        response = served.http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
    check_alive(served)


def test_header_floods_and_what_is_no_http(served):
    host, port = served.url.removeprefix("http://").split(":")
    flood = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"".join(
        b"X-%d: %s\r\n" % (i, b"y" * 80) for i in range(5000)
    )
    for sent in (flood, b"\x16\x03\x01\x02\x00" * 100, b"GET /" + b"a" * 100_000):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            try:
                connection.sendall(sent)
                answer = connection.recv(1000)
            except ConnectionError:  # it was closed before all of it was read
                answer = b"HTTP/1.1 400 "
        assert answer.startswith(b"HTTP/1.1 400 ")
    check_alive(served)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(served, slow, stream):
    before, lines = served.metric("kangaroo_completion_tokens_total"), len(served.log)
    with httpx.Client(base_url=served.url, timeout=60) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
                assert next(response.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=LONG, timeout=0.3)
    served.settle()
    assert not slow.busy
    assert served.metric("kangaroo_completion_tokens_total") - before < 100
    # The line of a request before may come late.
    wait_for(lambda: any(line["status"] == 499 for line in served.log[lines:]))
    assert [line["code"] for line in served.log[lines:] if line["status"] == 499] == ["client_left"]
    check_alive(served)


def test_a_full_queue_refuses_with_the_time_to_wait(served, slow):
    capacity = 7  # one slot, and six that wait
    with served.http.stream("POST", "/v1/completions", json={**LONG, "n": capacity, "stream": True}) as response:
        lines = response.iter_lines()  # held: without it, the connection is closed
        next(lines)
        assert served.metric("kangaroo_waiting") == capacity - 1
        assert served.metric("kangaroo_running") == 1
        refused = served.post("completions", prompt=PROMPT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
    served.settle()
    check_alive(served)


def test_a_request_ends_at_its_deadline(served, slow, monkeypatch):
    monkeypatch.setattr(served.server, "_config", dataclasses.replace(served.server._config, deadline=0.3))
    response = served.post("completions", **LONG)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    with pytest.raises(openai.APIError, match="no complete answer"):
        list(served.openai.completions.create(model="small", prompt=PROMPT, max_tokens=100, temperature=0, stream=True))
    monkeypatch.undo()
    check_alive(served)


def test_an_engine_that_fails_is_replaced(served, monkeypatch):
    engine = served.server._thread._engines[False]

    def refuse(_):
        raise ValueError("another bug")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "add", refuse)
        assert served.post("completions", **LONG).json()["error"]["code"] == "engine_failed"
    assert "ValueError: another bug" in served.failures.pop()
    check_alive(served)

    def fail():
        raise ValueError("a bug at /some/path")

    monkeypatch.setattr(engine, "step", fail)
    response = served.post("completions", **LONG)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
    assert "path" not in response.text
    assert "ValueError: a bug" in served.failures.pop()
    check_alive(served)


def test_logits_that_are_not_numbers_are_an_error(served, monkeypatch):
    engine = served.server._thread._engines[False]
    finish = engine._finish
    monkeypatch.setattr(engine, "_finish", lambda run, _: finish(run, "error"))
    response = served.post("completions", prompt=PROMPT, temperature=0, max_tokens=4)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "not_numbers")
    with pytest.raises(openai.APIError, match="not numbers"):
        list(served.openai.completions.create(model="small", prompt=PROMPT, max_tokens=4, temperature=0, stream=True))
    monkeypatch.undo()
    check_alive(served)


def test_the_access_log_has_no_texts(served):
    def ours():  # the line of a request before may come late
        return [line for line in served.log[lines:] if line.get("new_tokens") == 23]

    lines = len(served.log)
    served.post("completions", prompt=PROMPT, temperature=0, max_tokens=23)
    served.http.get("/health")
    wait_for(ours)
    (line,) = ours()
    assert "/health" not in [line["path"] for line in served.log[lines:]]
    assert json.loads(json.dumps(line)) == line
    assert (line["path"], line["status"], line["new_tokens"]) == ("/v1/completions", 200, 23)
    assert line["prompt_tokens"] == 1 + len(PROMPT)
    assert PROMPT not in json.dumps(line)


def test_health_metrics_and_headers(served):
    assert served.http.get("/health/live").json() == {"live": True}
    assert served.http.get("/health/ready").status_code == 200
    thread = served.server._thread
    thread.ready = False
    assert served.http.get("/health/ready").status_code == 503
    assert served.http.get("/health/live").status_code == 200
    thread.ready = True
    counts = "completion_tokens_total", "rounds_total", "time_to_first_token_seconds_count", "committed_tokens_total"
    before = [served.metric(f"kangaroo_{name}") for name in counts]
    usage = served.post("completions", prompt=PROMPT, temperature=0, max_tokens=24).json()["usage"]
    after = [served.metric(f"kangaroo_{name}") for name in counts]
    assert np.subtract(after, before).tolist() == [24, usage["kangaroo"]["rounds"], 1, 23]
    page = served.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "access-control-allow-origin" not in page.headers
    assert page.headers["x-frame-options"] == "DENY"
