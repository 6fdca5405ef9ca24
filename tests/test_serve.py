"""examples/serve.py: anytime answers over HTTP."""

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytestmark = pytest.mark.filterwarnings("ignore:Using `httpx` with `starlette.testclient`")

from examples import serve  # noqa: E402
from pkd_lightning.ensemble import ProgressiveEnsemble  # noqa: E402
from pkd_lightning.errors import PKDError  # noqa: E402


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from fastapi.testclient import TestClient

    with TestClient(serve.create_app("mnist")) as client:
        yield client


@pytest.fixture(scope="module")
def image() -> bytes:
    pixels = torch.randint(0, 256, (28, 28), generator=torch.Generator().manual_seed(0)).byte()
    Image.fromarray(pixels.numpy()).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def answers(reply: Any) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in reply.text.splitlines()]


def test_it_says_what_it_serves(client: Any) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    about = client.get("/").json()
    assert (about["ensemble"], about["students"], about["input_shape"]) == ("mnist", 7, [1, 28, 28])
    assert about["classes"] == list(range(10))
    assert about["macs"] == ProgressiveEnsemble.load("mnist").macs


@pytest.mark.parametrize(
    ("query", "limits"),
    [
        ("", {}),
        ("?members=2", {"members": 2}),
        ("?confidence=0.6", {"confidence": 0.6}),
        ("?budget_macs=2e5", {"budget_macs": 2e5}),
        ("?budget_ms=0", {"budget_ms": 0}),
    ],
)
def test_a_line_is_the_answer_of_a_prefix(query: str, limits: Any, client: Any, image: bytes) -> None:
    found = answers(client.post(f"/predict{query}", content=image))
    expected = [answer.rows()[0] for answer in ProgressiveEnsemble.load("mnist").stream(image, **limits)]
    times = [answer.pop("ms") for answer in found]
    assert times == sorted(times)
    assert found == expected
    assert [answer["students"] for answer in found] == list(range(1, len(found) + 1))


def test_a_line_is_sent_before_the_next_student_is_asked(image: bytes) -> None:
    ensemble = ProgressiveEnsemble.load("mnist")
    assert ensemble.macs  # counting asks them, too
    asked: list[int] = []
    for t, member in enumerate(ensemble.members):
        member.register_forward_hook(lambda *_, t=t: asked.append(t))
    sent = serve.lines(ensemble.stream(image))
    for t in range(3):
        assert json.loads(next(sent))["students"] == t + 1
        assert asked == list(range(t + 1))
    sent.close()  # type: ignore[attr-defined]
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("query", "content", "said"),
    [
        ("", b"no image", "the bytes: is no image that Pillow can read"),
        ("", b"", "is no image"),
        ("?members=9", None, "members=9: the ensemble has prefixes of 1 to 7 students"),
        ("?members=1&confidence=0.5", None, "members and confidence are given; give at most one"),
        ("?confidence=95", None, "confidence=95.0: must be a probability"),
        ("?budget_ms=nan", None, "budget_ms=nan: must be"),
        ("?budget_macs=3", None, "does not pay for the first student"),
        ("?members=two", None, "valid integer"),
    ],
)
def test_what_cannot_be_answered_says_what_is_expected(
    query: str, content: bytes | None, said: str, client: Any, image: bytes
) -> None:
    reply = client.post(f"/predict{query}", content=image if content is None else content)
    assert reply.status_code == 422
    assert said in reply.text


def test_a_file_that_is_too_large_is_not_kept(client: Any, monkeypatch: pytest.MonkeyPatch, image: bytes) -> None:
    monkeypatch.setattr(serve, "MOST_BYTES", len(image) - 1)
    reply = client.post("/predict", content=image)
    assert (reply.status_code, f"larger than {len(image) - 1} bytes" in reply.text) == (413, True)
    monkeypatch.setattr(serve, "MOST_BYTES", len(image))
    assert client.post("/predict", content=image).status_code == 200


def test_the_ensemble_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKD_ENSEMBLE", "minst")
    with pytest.raises(PKDError, match="Did you mean 'mnist'"):
        serve.create_app()
