"""Serve an ensemble over HTTP, anytime: each prefix's answer is sent as it is ready.

    pip install 'pkd-lightning[serve]'
    PKD_ENSEMBLE=runs/digits/HASH uvicorn --factory examples.serve:create_app    # default: the pretrained mnist
    curl -N --data-binary @image.png 'localhost:8000/predict?confidence=0.95'

The answer to an image is a JSON object a line, of one student more each time. A client that knows enough ends the
connection, and no further student is asked. A limit in the query ends it as well, see `predicting.Limits`.
"""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from pkd_lightning.errors import InputError
from pkd_lightning.predict import load
from pkd_lightning.predicting import Limits, Prediction

MOST_BYTES = 20 * 2**20  # of an image's file


def create_app(place: str | None = None) -> FastAPI:
    """The application.

    Args:
        place: a run's directory, its students folder, or a pretrained name; default: `$PKD_ENSEMBLE`, or `mnist`.

    Raises:
        PKDError: where there is no ensemble of images.
    """
    place = place or os.environ.get("PKD_ENSEMBLE", "mnist")
    ensemble = load(place, trust=(), limits=Limits())
    app = FastAPI(title="Anytime answers of a progressive ensemble")

    @app.get("/")
    def about() -> dict[str, Any]:
        """What is served."""
        return {
            "ensemble": place,
            "students": len(ensemble),
            "macs": ensemble.macs,
            "input_shape": list(ensemble.task.input_shape),
            "classes": ensemble.classes or ensemble.labels or list(range(ensemble.task.num_classes)),
        }

    @app.get("/health")
    def health() -> dict[str, str]:
        """Answers, so the server does."""
        return {"status": "ok"}

    @app.post("/predict")
    async def predict(
        request: Request,
        members: int | None = None,
        confidence: float | None = None,
        budget_macs: float | None = None,
        budget_ms: float | None = None,
    ) -> StreamingResponse:
        """The body is an image's file; the answer is a line for each prefix."""
        image = await body_of(request)
        try:
            answers = await run_in_threadpool(
                lambda: ensemble.stream(image, members, confidence, budget_macs, budget_ms)
            )
        except InputError as error:
            raise HTTPException(422, str(error)) from error
        return StreamingResponse(lines(answers), media_type="application/x-ndjson")

    return app


async def body_of(request: Request) -> bytes:
    """The body of a request, as far as it is no larger than an image's file may be."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise HTTPException(413, f"the image's file is larger than {MOST_BYTES:,} bytes")
    return bytes(content)


def lines(answers: Iterable[Prediction]) -> Iterator[str]:
    """A line of JSON for each answer to one image, with the milliseconds until it was ready."""
    for answer in answers:
        (row,) = answer.rows()
        yield json.dumps({**row, "ms": round(1000 * answer.seconds, 3)}) + "\n"
