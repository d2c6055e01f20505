"""Credentials come from the environment and stay there."""

import os
import pickle
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from runs import ROOT, make_config, start_job
from s3.servers import S3Server

from pipeline import config

KEY_SHAPES = re.compile(
    r"AKIA[0-9A-Z]{16}"  # AWS access key
    r"|aws_secret_access_key\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\bhf_[A-Za-z0-9]{30,}"  # Hugging Face token
    r"|\bghp_[A-Za-z0-9]{36}",  # GitHub token
    re.IGNORECASE,
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_s3_leaves_no_secret_behind(
    s3_server: S3Server, s3_bucket: str, weights: Path, tmp_path: Path
) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    storage = s3_server.storage()
    draw = [sys.executable, ROOT / "infra" / "demo_pictures.py", tmp_path / "shards"]
    subprocess.run([*draw, "--number", "8"], check=True)
    storage.upload(next((tmp_path / "shards").glob("*.tar")), f"{s3_bucket}/photos/a.tar")
    settings = make_config(
        f"{s3_bucket}/photos", f"{s3_bucket}/out", weights, storage=storage.options
    )
    with start_job(settings, tmp_path, AWS_SECRET_ACCESS_KEY=secret) as job:
        assert job.wait(400) == 0, job.log.read_text()
    written = [info.uri for info in storage.list_objects(f"{s3_bucket}/out")]
    assert any("/runs/" in uri for uri in written)
    for uri in written:
        assert secret.encode() not in storage.read(uri), uri
    for path in (job.log, job.out, tmp_path / "job.toml"):
        assert secret not in path.read_text(), path
    assert secret.encode() not in pickle.dumps((storage, settings))


def test_no_setting_takes_a_credential() -> None:
    names = [
        name for value in vars(config).values() if is_dataclass(value) for name in fields_of(value)
    ]
    assert "endpoint_url" in names
    assert [n for n in names if re.search("secret|password|token|access_key|credential", n)] == []


def fields_of(settings: type) -> list[str]:
    return [field.name for field in fields(settings)]


def test_no_tracked_file_looks_like_a_key() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    files = [ROOT / name for name in listed.stdout.splitlines()]
    texts = {path: path.read_text(errors="replace") for path in files if path.is_file()}
    assert [str(path) for path, text in texts.items() if KEY_SHAPES.search(text)] == []
