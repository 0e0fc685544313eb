"""Vectors, ranks, tokens, the list of models and LoRA adapters by name, over OpenAI's API and its neighbours'.

Vectors, tokens and answers are those of xllamacpp, asked directly; /tokenize is vLLM's, /rerank Jina's and Cohere's.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests

sys.path.insert(0, str(Path(__file__).parent))

from llm_server import (
    CAPITAL,
    CONTEXT,
    EMBED,
    PATIENCE_S,
    SMOL,
    WIDTH,
    LLMServer,
    Reference,
    cosine,
    save_adapter,
    save_model,
)

pytestmark = pytest.mark.xdist_group("openai-embeddings")
TEXTS = ["The cat sat on the mat.", "A kitten is on the carpet.", "Stock markets fell on Monday."]
GREEDY: dict[str, Any] = {"messages": CAPITAL, "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "pirate.gguf")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, adapter: Path) -> Iterator[LLMServer]:
    models = tmp_path_factory.mktemp("embeddings")
    folder = save_model(models, "smol", SMOL, smollm2)
    (folder / "adapters").mkdir()
    (folder / "adapters" / "pirate.gguf").symlink_to(adapter)
    save_model(models, "embed", EMBED, smollm2)
    with LLMServer(models) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: LLMServer) -> Iterator[openai.OpenAI]:
    with server.client() as found:
        yield found


@pytest.fixture(scope="module")
def vectors(smollm2: Path) -> list[list[float]]:
    """Of TEXTS."""
    return Reference(smollm2, embedding=True).embed(*TEXTS)


def post(server: LLMServer, path: str, **body: Any) -> requests.Response:
    return requests.post(server.url(path), json=body, timeout=PATIENCE_S)


def tokens(server: LLMServer, text: str, model: str = "embed") -> list[int]:
    return list(post(server, "/tokenize", model=model, prompt=text).json()["tokens"])


# Vectors


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_vectors_are_the_engines_in_either_form(client: openai.OpenAI, vectors: list[list[float]], form: Any) -> None:
    asked: Any = {} if form is None else {"encoding_format": form}  # without, the client asks for base64 and decodes it
    found = client.embeddings.create(model="embed", input=TEXTS, **asked)
    assert [one.index for one in found.data] == [0, 1, 2]
    assert (found.object, found.model, {one.object for one in found.data}) == ("list", "embed", {"embedding"})
    for one, expected in zip(found.data, vectors, strict=True):
        vector: Any = one.embedding
        if form == "base64":
            vector = np.frombuffer(base64.b64decode(vector), "<f4")
        assert len(vector) == WIDTH
        assert cosine(vector, expected) == pytest.approx(1, abs=1e-4)


def test_a_text_or_its_tokens_give_one_vector(
    server: LLMServer, client: openai.OpenAI, vectors: list[list[float]]
) -> None:
    ids = tokens(server, TEXTS[0])
    for one in (TEXTS[0], ids, [ids]):
        found = client.embeddings.create(model="embed", input=one)
        assert cosine(found.data[0].embedding, vectors[0]) == pytest.approx(1, abs=1e-4)
        assert len(found.data) == 1
        assert found.usage.prompt_tokens == found.usage.total_tokens == len(ids)


def test_the_usage_is_of_all_texts(server: LLMServer, client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="embed", input=TEXTS)
    assert found.usage.prompt_tokens == sum(len(tokens(server, text)) for text in TEXTS)


def test_dimensions_are_the_models_own(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="embed", input="a", dimensions=WIDTH)
    assert len(found.data[0].embedding) == WIDTH
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="embed", input="a", dimensions=64)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize("wrong", ["", [], [""], ["a", ""], [[]], [["a"]], {"a": 1}, [1.5], [-1], ["a"] * 2049])
def test_an_input_that_is_none_is_named(server: LLMServer, wrong: Any) -> None:
    found = post(server, "/v1/embeddings", model="embed", input=wrong)
    assert (found.status_code, found.json()["error"]["param"]) == (400, "input")


@pytest.mark.parametrize("wrong", ["word " * 600, [504] * 600])
def test_an_input_that_does_not_fit_is_the_clients_mistake(client: openai.OpenAI, wrong: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="embed", input=wrong)
    assert caught.value.code == "context_length_exceeded"


def test_a_token_that_the_model_does_not_have_is_the_clients_mistake(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="embed", input=[2**31 - 1])


def test_each_model_is_for_what_it_is_for(server: LLMServer, client: openai.OpenAI) -> None:
    for call in (
        lambda: client.embeddings.create(model="smol", input="a"),
        lambda: client.chat.completions.create(model="embed", messages=[{"role": "user", "content": "a"}]),
        lambda: client.completions.create(model="embed", prompt="a"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.param == "model"
    found = post(server, "/v1/rerank", model="smol", query="a", documents=["b"])
    assert (found.status_code, found.json()["error"]["param"]) == (400, "model")


# Ranks


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_are_ranked_by_the_angle_to_the_query(
    server: LLMServer, vectors: list[list[float]], path: str
) -> None:
    query, *documents = TEXTS
    found = post(server, path, model="embed", query=query, documents=documents)
    assert found.status_code == 200, found.text
    scores = [cosine(vectors[0], vectors[i]) for i in (1, 2)]
    order = sorted((0, 1), key=lambda i: -scores[i])
    results = found.json()["results"]
    assert [result["index"] for result in results] == order
    assert [result["relevance_score"] for result in results] == pytest.approx([scores[i] for i in order], abs=1e-4)
    assert [result["document"] for result in results] == [{"text": documents[i]} for i in order]


def test_only_the_best_are_told_and_their_texts_where_wanted(server: LLMServer) -> None:
    documents = [{"text": text} for text in TEXTS]
    found = post(
        server, "/v1/rerank", model="embed", query=TEXTS[2], documents=documents, top_n=1, return_documents=False
    ).json()["results"]
    assert [result.keys() for result in found] == [{"index", "relevance_score"}]
    assert found[0]["index"] == 2, "the query itself is among the documents"
    assert found[0]["relevance_score"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("documents", []), ("documents", ["a", ""]), ("documents", "a"), ("documents", [1]), ("query", ""),
     ("query", 1), ("top_n", 0), ("documents", ["a"] * 1001), ("input", "a")],
)  # fmt: skip
def test_a_bad_field_of_a_rerank_is_named(server: LLMServer, field: str, value: Any) -> None:
    found = post(server, "/v1/rerank", **{"model": "embed", "query": "a", "documents": ["b"], field: value})
    assert (found.status_code, found.json()["error"]["param"]) == (400, field)


# Tokens


def test_a_texts_tokens_are_the_models(server: LLMServer, smollm2: Path) -> None:
    reference = Reference(smollm2)
    answer = reference.complete({"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0,
                                 "logprobs": 1})  # fmt: skip
    said = answer["choices"][0]
    found = post(server, "/tokenize", model="smol", prompt=said["text"]).json()
    assert found["tokens"] == [entry["id"] for entry in said["logprobs"]["content"]]
    assert (found["count"], found["max_model_len"]) == (3, CONTEXT)
    prompt = post(server, "/tokenize", model="smol", prompt="The capital of France is").json()
    assert prompt["count"] == answer["usage"]["prompt_tokens"]
    chat = post(server, "/tokenize", model="smol", messages=CAPITAL, add_generation_prompt=True).json()
    assert chat["count"] == reference.chat(GREEDY)["usage"]["prompt_tokens"]


@pytest.mark.parametrize("text", ["hello world", " ", "naïve café — 東京 🙂", "a\n\n\tb", ""])
def test_tokens_become_the_text_again(server: LLMServer, text: str) -> None:
    found = post(server, "/detokenize", model="smol", tokens=tokens(server, text, "smol"))
    assert (found.status_code, found.json()) == (200, {"prompt": text})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": CAPITAL}),
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {"messages": CAPITAL, "add_generation_prompt": False}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**31 - 1]}),
        ("/detokenize", {"tokens": [49152]}),  # SmolLM2 has so many, from 0
    ],
)
def test_what_is_no_text_and_no_tokens_is_refused(server: LLMServer, path: str, body: dict[str, Any]) -> None:
    found = post(server, path, model="smol", **body)
    assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error"), found.text


# Models and adapters


def test_models_and_adapters_are_listed(client: openai.OpenAI) -> None:
    found = {model.id: model for model in client.models.list()}
    assert found.keys() == {"embed", "smol", "pirate"}
    assert {(model.object, model.owned_by) for model in found.values()} == {("model", "doorstep")}
    details = {name: model.model_dump() for name, model in found.items()}
    assert (details["smol"]["max_model_len"], details["embed"]["max_model_len"]) == (CONTEXT, 512)
    assert (details["pirate"]["parent"], details["smol"]["parent"]) == ("smol", None)
    assert all(model.created > 1_600_000_000 for model in found.values())


@pytest.mark.parametrize(("name", "parent"), [("smol", None), ("pirate", "smol"), ("smol:pirate", "smol")])
def test_a_model_is_found_by_its_name(client: openai.OpenAI, name: str, parent: str | None) -> None:
    found = client.models.retrieve(name)
    assert (found.id, found.model_dump()["parent"]) == (name, parent)


@pytest.mark.parametrize("name", ["nothing", "smol:nothing", "embed:pirate", "smol/1", "...", "pirate:smol"])
def test_a_model_that_is_not_there_is_not_found(server: LLMServer, client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(name)
    found = post(server, "/v1/chat/completions", **{**GREEDY, "model": name})
    assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_found")


def test_an_adapter_by_its_name_answers_for_itself(client: openai.OpenAI, smollm2: Path, adapter: Path) -> None:
    def ask(model: str) -> str | None:
        found = client.chat.completions.create(model=model, **GREEDY)
        assert found.model == model
        return found.choices[0].message.content

    plain, changed = (
        made.chat(GREEDY)["choices"][0]["message"]["content"]
        for made in (Reference(smollm2), Reference(smollm2, adapter=adapter))
    )
    assert plain != changed, "the test's adapter does something"
    # In turn, so that what one left in a slot's cache would be seen by the other.
    wanted = {"smol": plain, "pirate": changed, "smol:pirate": changed}
    for model in ("smol", "pirate", "smol", "smol:pirate", "smol", "smol", "pirate", "pirate"):
        assert ask(model) == wanted[model]


def test_an_adapter_gets_nothing_that_the_model_kept_of_a_prompt_without_it(client: openai.OpenAI) -> None:
    def cached(model: str, topic: str) -> int:
        content = f"Tell me about the history of {topic}. " * 20
        found = client.chat.completions.create(
            model=model, max_tokens=1, messages=[{"role": "user", "content": content}]
        )
        assert found.usage is not None
        assert found.usage.prompt_tokens_details is not None
        return found.usage.prompt_tokens_details.cached_tokens or 0

    # The slots forget the first prompt of each, and the memory beside them may keep it.
    for model in ("smol", "pirate"):
        for topic in ("Rome", "glass", "tea"):
            assert cached(model, topic) < 64


def test_vectors_are_whole_and_in_order_however_many_are_asked_for(client: openai.OpenAI) -> None:
    texts = [f"Text number {i}." for i in range(40)]
    found = client.embeddings.create(model="embed", input=texts)
    assert [entry.index for entry in found.data] == list(range(40))
    for i in (0, 15, 16, 39):
        (alone,) = client.embeddings.create(model="embed", input=texts[i]).data
        assert cosine(alone.embedding, found.data[i].embedding) > 0.999
    assert found.usage.prompt_tokens >= 40 * 4


def test_who_leaves_does_not_keep_the_engine(server: LLMServer, client: openai.OpenAI) -> None:
    texts = ["word " * 200 + str(i) for i in range(1000)]  # minutes of work
    with pytest.raises(requests.Timeout):
        requests.post(server.url("/v1/embeddings"), json={"model": "embed", "input": texts}, timeout=1)
    assert client.embeddings.create(model="embed", input="next").data
