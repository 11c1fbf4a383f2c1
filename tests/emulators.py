"""Emulators of Google Cloud Storage and S3 as processes of their own, and a proxy before them that counts, and fails
where a test says so."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import pytest

from kangaroo_jax import buckets

BUCKET = "kangaroo"
_COMMANDS = {
    "gs://": "from gcp_storage_emulator.__main__ import main\n"
    "main(['start', '-M', '--default-bucket={bucket}', '--port={port}'])",
    "s3://": "from moto.server import main; main(['--port={port}'])",
}
# moto wants a signature, and does not check it.
_AMAZON = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
_SIGNED = {"gs://": "", "s3://": _AMAZON}
_HOP = {"connection", "transfer-encoding", "content-length", "host", "keep-alive"}


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match `pattern`: the answer's `status`; an answer
    that is `cut` in the middle, or `short` as if that were all; or so many `seconds` before it."""

    pattern: str
    times: int = 10**9
    status: int | None = None
    body: str = '{"error": {"code": 503, "message": "try again"}}'
    cut: bool = False
    short: bool = False
    seconds: float = 0.0
    met: int = 0


class Service:
    """A running emulator behind a proxy.

    Attributes:
      scheme: gs:// or s3://.
      url: of the proxy.
      received: bytes of bodies that clients were sent.
      requests: method and path of each request.
      faults: what goes wrong from now on.
    """

    def __init__(self, scheme: str):
        self.scheme, self.received, self.requests, self.faults = scheme, 0, [], []
        with socket.create_server(("localhost", 0)) as free:
            self._port = free.getsockname()[1]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMANDS[scheme].format(port=self._port, bucket=BUCKET)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._lock, self._exclusive = threading.Lock(), threading.Lock()
        service = self

        class Handler(_Handler):
            proxied = service

        self._proxy = _Proxy(("localhost", 0), Handler)
        self.url = f"http://localhost:{self._proxy.server_address[1]}"
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        try:
            self._wait()
            if scheme == "s3://":
                self._ask("PUT", f"/{BUCKET}")
        except BaseException:
            self.end()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What leads clients here, and gives them a login."""
        if self.scheme == "gs://":
            return {"STORAGE_EMULATOR_HOST": self.url}
        login = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": self.url} | login

    def location(self, name: str) -> str:
        return f"{self.scheme}{BUCKET}/{name}"

    def listing(self, prefix: str = "") -> dict[str, int]:
        """Name -> bytes, as the emulator itself says, asked by plain HTTP."""
        quoted = urllib.parse.quote(prefix)
        if self.scheme == "gs://":
            found = json.loads(self._ask("GET", f"/storage/v1/b/{BUCKET}/o?prefix={quoted}"))
            return {item["name"]: int(item["size"]) for item in found.get("items", [])}
        text = self._ask("GET", f"/{BUCKET}?list-type=2&prefix={quoted}").decode()
        return {k: int(n) for k, n in re.findall(r"<Key>(.*?)</Key>.*?<Size>(\d+)</Size>", text, re.DOTALL)}

    def content(self, name: str) -> bytes:
        quoted = urllib.parse.quote(name, safe="")
        if self.scheme == "gs://":
            return self._ask("GET", f"/download/storage/v1/b/{BUCKET}/o/{quoted}?alt=media")
        return self._ask("GET", f"/{BUCKET}/{urllib.parse.quote(name)}")

    def put(self, name: str, content: bytes) -> None:
        if self.scheme == "gs://":
            path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={urllib.parse.quote(name, safe='')}"
            self._ask("POST", path, content)
        else:
            self._ask("PUT", f"/{BUCKET}/{urllib.parse.quote(name)}", content)

    def remove(self, name: str) -> None:
        base = f"/storage/v1/b/{BUCKET}/o/" if self.scheme == "gs://" else f"/{BUCKET}/"
        self._ask("DELETE", base + urllib.parse.quote(name, safe="" if self.scheme == "gs://" else "/"))

    def put_folder(self, folder, prefix: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

    def end(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> None:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("localhost", self._port), timeout=1):
                return
            if self._process.poll() is not None:
                raise RuntimeError(f"the emulator of {self.scheme} ended with {self._process.returncode}")
            time.sleep(0.1)
        raise RuntimeError(f"the emulator of {self.scheme} does not answer")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/octet-stream", "Authorization": _SIGNED[self.scheme]}
        request = urllib.request.Request(f"http://localhost:{self._port}{path}", body, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def _fault(self, line: str) -> Fault | None:
        with self._lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.met < fault.times and re.search(fault.pattern, line):
                    fault.met += 1
                    return fault
        return None


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client was killed
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxied: Service

    def _forward(self) -> None:
        service = self.proxied
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = self._chunks()
        fault = service._fault(f"{self.command} {self.path}")
        if fault is not None and fault.seconds:
            time.sleep(fault.seconds)
        if fault is not None and fault.status is not None:
            self._answer(fault.status, {"Content-Type": "application/json"}, fault.body.encode())
            return
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        exclusive = query.get("ifGenerationMatch") == ["0"]  # which this emulator does not look at
        named = re.search(rb'"name": ?"(.*?)"', body[:1000])
        name = "" if named is None else named.group(1).decode()
        with service._exclusive if exclusive else contextlib.nullcontext():
            if exclusive and name in service.listing(name):
                self._answer(412, {}, b'{"error": {"code": 412, "message": "conditionNotMet"}}')
                return
            status, headers, content = self._ask(*self._as_it_is(query, name, body))
        if fault is not None and fault.short:
            content = content[: len(content) // 2]
        self._answer(status, headers, content, cut=fault is not None and fault.cut)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _forward

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _as_it_is(self, query: dict[str, list[str]], name: str, body: bytes) -> tuple[str, bytes]:
        """The path and body to forward. Of an object in several parts, this emulator takes off a line break at its end,
        so it goes on as one part."""
        if query.get("uploadType") != ["multipart"]:
            return self.path, body
        boundary = b"--" + re.search(r'boundary="?([^";]+)', self.headers["Content-Type"]).group(1).encode()
        content = body.split(boundary, 2)[2].partition(b"\n\n")[2].rpartition(b"\n" + boundary)[0]
        path = f"{urllib.parse.urlsplit(self.path).path}?uploadType=media&name={urllib.parse.quote(name, safe='')}"
        return (path, content) if content else (self.path, body)  # nor does it take an empty one

    def _ask(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        port = self.proxied._port
        connection = http.client.HTTPConnection("localhost", port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        if path != self.path:
            headers["Content-Type"] = "application/octet-stream"
        connection.request(self.command, path, body, headers | {"Host": f"localhost:{port}"})
        answer = connection.getresponse()
        content = answer.read()
        there = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        if self.command == "HEAD":
            there["Content-Length"] = answer.getheader("Content-Length", "0")
        if "Location" in there:
            there["Location"] = there["Location"].replace(f"http://localhost:{port}", self.proxied.url)
        connection.close()
        return answer.status, there, content

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        sent = content[: len(content) // 2] if cut else content
        with contextlib.suppress(ConnectionError):
            self.wfile.write(sent)
        with self.proxied._lock:
            self.proxied.received += len(sent)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _started(scheme):
    for module in ("gcsfs", "s3fs", "gcp_storage_emulator", "moto"):
        pytest.importorskip(module)
    service = Service(scheme)
    try:
        yield service
    finally:
        service.end()


@pytest.fixture(scope="session")
def _gs():
    yield from _started("gs://")


@pytest.fixture(scope="session")
def _s3():
    yield from _started("s3://")


@pytest.fixture(params=["_gs", "_s3"], ids=["gs", "s3"])
def service(request, monkeypatch):
    """An emulator that this process's clients ask, without faults."""
    yield from _used(request.getfixturevalue(request.param), monkeypatch)


@pytest.fixture
def gcs(_gs, monkeypatch):
    """As `service`, of Google's kind alone."""
    yield from _used(_gs, monkeypatch)


@pytest.fixture
def aws(_s3, monkeypatch):
    """As `service`, of Amazon's kind alone."""
    yield from _used(_s3, monkeypatch)


def _used(found, monkeypatch):
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    found.faults.clear()
    buckets._client.cache_clear()
    yield found
    found.faults.clear()
    buckets._client.cache_clear()
