"""Exports of a local cluster, in a shell with variables of another storage and of a proxy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

from gptj_local.exports import OF_ANOTHER_STORAGE, shield, write_exports
from gptj_local.s3 import LocalS3

SHELL = 'set -eu; . ./env; . ./env; exec "$0" -c "$1"'  # sourced twice
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def sourced(folder: Path, environment: dict[str, str], program: str = SHOW) -> str:
    """What a program prints with the exports."""
    result = subprocess.run(
        ["sh", "-c", SHELL, sys.executable, program],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return result.stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "corp.example"}, "corp.example,127.0.0.1,localhost"),
        ({"no_proxy": ".a b", "NO_PROXY": "upper"}, ".a b,127.0.0.1,localhost"),
        ({"no_proxy": "*"}, "*"),
        ({"no_proxy": "x,127.0.0.1,localhost,y"}, "x,127.0.0.1,localhost,y"),
    ],
)
def test_a_shell_and_a_program_are_shielded_alike(
    tmp_path: Path, given: dict[str, str], expected: str
) -> None:
    write_exports(tmp_path / "env", {"A": "b 'c' $d"})
    others = dict.fromkeys(OF_ANOTHER_STORAGE, "theirs")
    found = json.loads(sourced(tmp_path, {**others, **given}))
    environment = {**others, **given}
    shield(environment)
    shield(environment)
    assert found["A"] == "b 'c' $d"
    for each in (found, environment):
        assert each["no_proxy"] == each["NO_PROXY"] == expected
        assert not each.keys() & others.keys()


def test_the_local_storage_is_reached_whatever_the_user_has_set(
    s3: LocalS3, tmp_path: Path
) -> None:
    write_exports(tmp_path / "env", s3.environment())
    elsewhere = "http://127.0.0.2:9"
    theirs = {
        "AWS_SESSION_TOKEN": "theirs",
        "AWS_PROFILE": "theirs",
        "AWS_ENDPOINT_URL_S3": elsewhere,
        "HTTP_PROXY": elsewhere,
        "http_proxy": elsewhere,
    }
    boto3.client("s3").put_object(Bucket=s3.bucket, Key="exports/one", Body=b"here")
    program = (
        "import boto3; print(boto3.client('s3').get_object(Bucket='gptj', Key='exports/one')"
        "['Body'].read())"
    )
    assert sourced(tmp_path, theirs, program) == "b'here'\n"
