"""Inputs in a bucket, on a server of moto's in this process. Skipped without moto[server] and s3fs."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import pytest

pytest.importorskip("datatrove")
pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytest.importorskip("flask")

import fsspec
from moto.server import ThreadedMotoServer

from llmtrain.config.clean import CollectConfig
from llmtrain.data.clean.collect import refuse_unreadable
from tests.data.clean.members import collected, dropped


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket with two files of rows, one of them packed, and one of another kind."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    place = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in (("ENDPOINT_URL", place), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x")):
        monkeypatch.setenv(f"AWS_{name}", value)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("pages")
    files.pipe("pages/a/one.jsonl", b'{"text": "plain"}\n')
    files.pipe("pages/a/two.jsonl.gz", gzip.compress(b'{"text": "packed"}\n'))
    files.pipe("pages/a/cut.jsonl.gz", gzip.compress(b'{"text": "cut"}\n' * 5000)[:60])
    files.pipe("pages/a/other.bin", b"x")
    yield "s3://pages"
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.timeout(60)
def test_a_bucket_is_read_and_a_missing_one_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, counts, _ = collected("jsonl", f"{bucket}/a")
    assert [each.text for each in documents if each.text != "cut"] == ["plain", "packed"]
    assert dropped(counts) == {"other_ending": 1, "gzip_cut": 1} and documents[-1].id == f"{bucket}/a/two.jsonl.gz#1"
    assert [each.text for each in collected("jsonl", f"{bucket}/a/t*.gz")[0]] == ["packed"]
    missing = {
        "s3://none/a": "found 1 entries, all of them vanished; give",
        f"{bucket}/a/no.jsonl": "found 1 entries, all of them vanished; give",
        f"{bucket}/none/*.jsonl": "found nothing; give",
    }
    for path, told in missing.items():
        with pytest.raises(ValueError, match=told):
            refuse_unreadable(CollectConfig(name="s", type="jsonl", path=path))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        ValueError, match=r"cannot be listed \(.*127\.0\.0\.1:9.*\); give a path that fsspec can read"
    ) as error:
        refuse_unreadable(CollectConfig(name="s", type="jsonl", path="s3://pages/a"))
    assert "\n" not in str(error.value)
