"""obstore: where credentials and addresses come from, and what an upload may take."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actstore.storage import s3_obstore
from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs
from actstore.testing.blobs import at_once, noise
from tests.conftest import S3Server


@pytest.fixture
def blobs(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Blobs:
    monkeypatch.setenv("ACTSTORE_S3", "obstore")
    return open_blobs(s3_url)


def test_profile_gives_credentials_region_and_endpoint(
    blobs: Blobs, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text(
        "[profile ours]\naws_access_key_id = admin\naws_secret_access_key = secret\n"
        f"region = us-west-2\nendpoint_url = {s3_server.endpoint}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "ours")
    assert blobs.create("a", [b"x"])
    assert bytes(blobs.read("a")) == b"x"


def test_endpoint_of_s3_goes_before_that_of_all_services(
    blobs: Blobs, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint)
    assert blobs.create("a", [b"x"])


def test_credentials_that_expire_are_asked_for_again(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first answer of the process has no right to write, the later ones have.
    asked = tmp_path / "asked"
    script = tmp_path / "credentials"
    script.write_text(
        "#!/bin/sh\n"
        f"echo >> {asked}\n"
        f"if [ $(wc -l < {asked}) -gt 1 ]; then id=admin; else id=reader; fi\n"
        "expires=$(date -u -d '+1 second' +%Y-%m-%dT%H:%M:%SZ)\n"
        'echo "{\\"Version\\": 1, \\"AccessKeyId\\": \\"$id\\", \\"SecretAccessKey\\": \\"secret\\", '
        '\\"Expiration\\": \\"$expires\\"}"\n'
    )
    script.chmod(0o755)
    config = tmp_path / "config"
    config.write_text(f"[profile ours]\ncredential_process = {script}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "ours")
    assert blobs.create("a", [b"x"])
    assert len(asked.read_text()) > 1


def test_parts_are_sent_from_where_they_lie(blobs: Blobs) -> None:
    data = noise(4 << 20)
    whole = np.concatenate([np.frombuffer(b"head", np.uint8), data, np.frombuffer(b"tail", np.uint8)])
    frozen = whole[4:-4].copy()
    frozen.flags.writeable = False
    assert (
        at_once(lambda i: blobs.create(f"a{i}", [b"head", frozen if i % 2 else data, b"tail"])) == [True] * 8
    )
    assert at_once(lambda i: bytes(blobs.read(f"a{i}")) == whole.tobytes()) == [True] * 8


@pytest.fixture
def slow_server() -> Iterator[str]:
    """Takes two seconds for an upload before it answers it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(2)
                received = b""
                while b"\r\n\r\n" not in received:
                    received += connection.recv(1 << 16)
                threading.Event().wait(2)
                while not received.endswith(b"the end"):
                    received = received[-10:] + connection.recv(1 << 16)
                connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "0"\r\nContent-Length: 0\r\n\r\n')

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_long_upload_is_not_ended_by_the_read_timeout(
    slow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_obstore, "READ_TIMEOUT_S", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", slow_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    assert s3_obstore.ObjectBlobs("s3://bucket/a").create("a", [noise(8 << 20), b"the end"])
