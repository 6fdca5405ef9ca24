"""A W&B server that answers as much as wandb 0.31 asks of it, and keeps what it is sent."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Listens on a port of its own until it is closed.

    Attributes:
        runs: what each run was last created with, by id.
        history: the rows of each run, by id.
        asked: names of the queries, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # W&B's process hangs up when it ends

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found.group(1) if found else ""
        self.asked.append(name)
        run = str(variables.get("name"))
        entity = {"id": "e", "name": "entity"}
        project = {"id": "p", "name": variables.get("project") or "project", "entity": entity}
        bucket: dict[str, Any] = {"id": f"b{run}", "name": run, "displayName": variables.get("displayName") or run}
        rows = self.history.get(run, [])
        bucket |= {"config": "{}", "summaryMetrics": "{}", "tags": [], "historyLineCount": len(rows)}
        bucket |= {"eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
        bucket |= {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "project": project}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": bucket if run in self.runs else None}}
        if name == "UpsertBucket":
            new = run not in self.runs
            given = {key: value for key, value in variables.items() if value is not None}
            self.runs[run] = {**self.runs.get(run, {}), **given}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if name == "Viewer":
            return {"viewer": {"id": "me", "entity": "entity", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "CreateArtifact":  # as if the server had it already
            sequence = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, path: str, files: dict[str, Any]) -> None:
        sent = files.get("wandb-history.jsonl")
        if sent is not None:
            rows = self.history.setdefault(path.split("/")[-2], [])
            assert sent["offset"] == len(rows)  # W&B continues where it has been told that the run is
            rows += [json.loads(line) for line in sent["content"]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            sent = json.loads(body)
            self._answer({"data": self.server.answer(sent["query"], sent.get("variables") or {})})
        else:
            if self.path.endswith("/file_stream"):
                self.server.stream(self.path, json.loads(body).get("files") or {})
            self._answer({"exitcode": None, "limits": {}})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, value: dict[str, Any]) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
