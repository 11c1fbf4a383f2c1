"""Clients of a server, in a process of their own: `python -m kangaroo_jax.bench.serve_clients`, which bench serve runs.

Standard input is an object: the server's "host" and "port", the number of "clients", and the "bodies" of requests to
/v1/completions that stream. Each client sends the next one as soon as its last answer is complete. Standard output is
an object: the "seconds" of all, and for each body, in order, the text, the seconds to its "first" piece, and, where the
server says, its new "tokens". Uses Python's standard library alone, so that it takes little of the machine.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from typing import Any


def main() -> None:
    asked = json.load(sys.stdin)
    bodies = [json.dumps(body) for body in asked["bodies"]]
    answers: list[dict[str, Any]] = [{} for _ in bodies]
    waiting = iter(range(len(bodies)))
    lock = threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection(asked["host"], asked["port"])
        while True:
            with lock:
                place = next(waiting, None)
            if place is None:
                return
            answers[place] = _ask(connection, bodies[place])

    threads = [threading.Thread(target=client) for _ in range(asked["clients"])]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump({"seconds": time.perf_counter() - start, "answers": answers}, sys.stdout)


def _ask(connection: http.client.HTTPConnection, body: str) -> dict[str, Any]:
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text, first, tokens = "", None, None
    for line in response:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[len(b"data: ") :])
            text += "".join(choice["text"] for choice in chunk["choices"])
            first = time.perf_counter() - start if first is None else first
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return {"status": response.status, "text": text, "first": first, "tokens": tokens}


if __name__ == "__main__":
    main()
