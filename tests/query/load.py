"""Many connections that ask a server for slices of all kinds at once: ``python -m tests.query.load URL_OF_STORE``.

It uses ``wrk`` where it is installed, else a client of its own, which is slower than the server.
"""

import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import urlopen

N_CONNECTIONS: Final = 64
_FORMATS: Final = ("raw", "safetensors", "npy", "arrow", "json")
_LENGTH: Final = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)

_SCRIPT: Final = """
local requests = {%s}
local expected = {["200"]=true, ["206"]=true, ["304"]=true}
local n, seed = 0, 0
local threads = {}
function setup(thread) thread:set("first", #threads * 7); table.insert(threads, thread) end
function init(args) n = first; n_wrong = 0 end
function request() n = n + 1; return requests[n %% #requests + 1] end
function response(status, headers, body)
  if not expected[tostring(status)] then n_wrong = n_wrong + 1 end
end
function done(summary, latency, requests)
  local wrong = 0
  for _, thread in ipairs(threads) do wrong = wrong + thread:get("n_wrong") end
  local e = summary.errors
  io.write(string.format('\\n{"n":%%d,"seconds":%%f,"nbytes":%%d,"p50_ms":%%f,"p99_ms":%%f,"n_errors":%%d}\\n',
    summary.requests, summary.duration / 1e6, summary.bytes, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, wrong + e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """Result of a load."""

    n: int
    """Requests that were answered."""
    seconds: float
    nbytes: int
    p50_ms: float
    p99_ms: float
    n_errors: int
    """Replies with another status than 200, 206 or 304, broken connections, and timeouts."""

    @property
    def per_second(self) -> float:
        return self.n / self.seconds


@dataclass(frozen=True)
class Ask:
    """A request."""

    path: str
    headers: dict[str, str]

    def to_bytes(self, host: str) -> bytes:
        fields = {"Host": host, **self.headers}
        lines = [f"GET {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode()


def mix(url: str) -> list[Ask]:
    """Requests for all hooks and formats: one position, one prompt, several and many of them, parts, and some with
    known ETags.
    """
    with urlopen(url, timeout=60) as reply:
        store: dict[str, Any] = json.load(reply)
    n_rows, path, requests = store["shape"][0], urlsplit(url).path, []
    for number, hook in enumerate(store["hooks"]):
        for turn in range(20):
            row = (7919 * (20 * number + turn)) % (n_rows - 64)
            where = f"{path}/hooks/{hook}/slice?seq="
            form = _FORMATS[turn % len(_FORMATS)]
            requests += [
                Ask(f"{where}{row}&pos={turn % store['shape'][1]}&format={form}", {}),
                Ask(f"{where}{row}", {"Accept": "application/octet-stream"}),
                Ask(f"{where}{row}:{row + 4}&format={form}", {}),
                Ask(f"{where}{row}:{row + 64}", {}),
                Ask(f"{where}{row},{row + 40},{row + 3}", {"Accept": "application/x-safetensors"}),
                Ask(f"{where}{row}:{row + 8}", {"Range": "bytes=100-999"}),
                Ask(f"{where}{row}", {"If-None-Match": _tag(url, f"/hooks/{hook}/slice?seq={row}")}),
            ]
    return requests


def _tag(url: str, path: str) -> str:
    with urlopen(url + path, timeout=60) as reply:
        tag: str = reply.headers["ETag"]
        return tag


def load(url: str, seconds: float) -> Load:
    """Put load on a store of a server, with wrk where it is installed.

    Args:
        url: URL of the store.
        seconds: duration of the load.
    """
    wrk = shutil.which("wrk")
    asked = mix(url)
    if wrk is None:
        return asyncio.run(_load(url, seconds, asked))
    return _with_wrk(wrk, url, seconds, asked)


def _with_wrk(wrk: str, url: str, seconds: float, asked: list[Ask]) -> Load:
    host = urlsplit(url).netloc
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "load.lua"
        script.write_text(
            _SCRIPT % ",".join(json.dumps(request.to_bytes(host).decode()) for request in asked)
        )
        command = [wrk, "-t2", f"-c{N_CONNECTIONS}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        done = subprocess.run([*command, "-s", str(script), url], capture_output=True, text=True, check=True)
    return Load(**json.loads(done.stdout.splitlines()[-1]))


async def _load(url: str, seconds: float, asked: list[Ask]) -> Load:
    parts = urlsplit(url)
    requests = [request.to_bytes(parts.netloc) for request in asked]
    latencies: list[float] = []
    n_errors = nbytes = 0
    started = time.perf_counter()

    async def ask_on(first: int) -> None:
        nonlocal n_errors, nbytes
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            n = first
            while time.perf_counter() - started < seconds:
                n += 1
                begun = time.perf_counter()
                writer.write(requests[n % len(requests)])
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head.split(b" ", 2)[1])
                length = _LENGTH.search(head)
                has_body = length is not None and status != 304
                body = await reader.readexactly(int(length[1])) if has_body and length else b""
                nbytes += len(head) + len(body)
                n_errors += status not in (200, 206, 304)
                latencies.append(time.perf_counter() - begun)
        except (OSError, EOFError):
            n_errors += 1
        finally:
            writer.close()
            await writer.wait_closed()

    await asyncio.gather(*(ask_on(7 * number) for number in range(N_CONNECTIONS)))
    took = time.perf_counter() - started
    percentiles = statistics.quantiles(latencies, n=100)
    return Load(len(latencies), took, nbytes, 1e3 * percentiles[49], 1e3 * percentiles[98], n_errors)


if __name__ == "__main__":
    print(json.dumps(asdict(load(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 30.0))))  # noqa: T201
