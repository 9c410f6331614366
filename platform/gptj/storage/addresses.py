"""Validate and normalize addresses: local paths and `s3://bucket/key`.

Everything that takes an address goes through here, so that the whole product accepts the same ones.
Checkpoints can also be hub ids (gptj.checkpoints.hub), and data `sample://…` and `hf://datasets/…`.
Any other scheme is rejected with a remedy: it would otherwise become a strangely named local
folder, and files written there would be lost.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

SAMPLE = "sample://"
HUB_DATA = "hf://datasets/"
_S3 = "s3://"
# `scheme:/` at the beginning: pathlib reduces `s3://` to one slash.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")  # accepted by boto3
_HUB_URL = re.compile(
    r"(?:hf://|https?://(?:huggingface\.co|hf\.co)/)(?!datasets/|spaces/)([\w.-]+/[\w.-]+).*", re.I
)
_HUB_DATA_URL = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+).*", re.I
)
_HUB_DATA = re.compile(
    r"hf://datasets/(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^/@]+))?(?:/(?P<path>.*))?"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class AddressError(ValueError):
    """Not a valid address; the message has the value, the reason and the remedy."""


def normalized(address: str | os.PathLike[str], *, samples: bool = False) -> str:
    """An address in its canonical form: `~` expanded, no trailing `/`.

    A hub id also passes, since it looks like a relative path: see gptj.checkpoints.hub.

    Args:
        samples: allow `sample://…` and `hf://datasets/…`, for data.

    Raises:
        AddressError: if it is empty, has an unknown scheme, or is an `s3://` address without a
            bucket or with an ambiguous key (`//`, `.` or `..` in it).
    """
    text = os.fspath(address)
    if not text.strip():
        raise AddressError(
            f"the address is empty ({text!r}); remedy: leave it out, or give a path (. is the "
            f"current folder) or s3://bucket/key"
        )
    if text != text.strip() or _CONTROL.search(text):
        raise AddressError(
            f"the address {text!r} has white space around it or contains control characters; "
            f"remedy: remove them"
        )
    if text.startswith(_S3):
        return _normalized_s3(text)
    if text.startswith(SAMPLE):
        if not samples:
            raise AddressError(f"{text} is built-in data, which can only be read as data")
        return text
    if text.startswith(HUB_DATA):
        if not samples:
            raise AddressError(f"{text} is a data set on the hub, which can only be read as data")
        split_hub_data(text)
        return text.rstrip("/")
    if (match := _SCHEME.match(text)) is not None:
        raise AddressError(f"{text}: {match[1]}:// is not supported; {_remedy(text)}")
    if "://" in text and not text.startswith((".", "/")):
        raise AddressError(
            f"{text!r} is neither a path nor an s3:// address; remedy: remove what precedes the "
            f"scheme"
        )
    return _normalized_path(text)


def is_s3(address: str) -> bool:
    """Whether it is an `s3://` address rather than a path. AddressError if it is neither."""
    return normalized(address).startswith(_S3)


def split_s3(address: str) -> tuple[str, str]:
    """`s3://bucket/key` as (bucket, key); AddressError for anything else."""
    if not address.startswith(_S3):
        raise AddressError(f"an S3 address is s3://bucket/key, got {address!r}")
    bucket, _, key = _normalized_s3(address).removeprefix(_S3).partition("/")
    return bucket, key


def split_hub_data(address: str) -> tuple[str, str | None, str]:
    """`hf://datasets/OWNER/NAME@REVISION/PATH` as repository, optional revision, and path.

    AddressError for anything else.
    """
    found = _HUB_DATA.fullmatch(address.rstrip("/"))
    if found is None:
        raise AddressError(
            f"a data set on the hub is hf://datasets/OWNER/NAME, optionally followed by @REVISION "
            f"and /PATH, got {address!r}"
        )
    return found["id"], found["revision"], found["path"] or ""


def at_commit(address: str, commit: str) -> str:
    """A data set's address on the hub, at a commit rather than at its own revision."""
    repository, _, path = split_hub_data(address)
    return f"{HUB_DATA}{repository}@{commit}" + (f"/{path}" if path else "")


def local_path(address: str | os.PathLike[str]) -> Path:
    """A local address as a path; AddressError if it is not local."""
    text = normalized(address)
    if text.startswith(_S3):
        raise AddressError(f"{text} must be a local path: it cannot be on S3")
    return Path(text)


def absolute(address: str | os.PathLike[str], *, samples: bool = False) -> str:
    """Like `normalized`, but with relative paths made absolute."""
    text = normalized(address, samples=samples)
    return text if "://" in text else os.path.abspath(text)


def join(address: str, *parts: str) -> str:
    """The address of something in a folder."""
    if address.startswith(_S3):
        return posixpath.join(address.rstrip("/"), *parts)
    return os.path.join(address, *parts)


def name_within(address: str, folder: str) -> str | None:
    """An address relative to a folder that it is in, "" for the folder itself; None: elsewhere.

    Local ones may be relative to the current folder, and are compared where links lead.
    """
    if is_s3(address) != is_s3(folder):
        return None
    if is_s3(address):
        inner, outer = normalized(address), normalized(folder)
    else:
        inner, outer = (os.path.realpath(local_path(each)) for each in (address, folder))
    if inner == outer:
        return ""
    prefix = outer.rstrip("/") + "/"
    return inner.removeprefix(prefix) if inner.startswith(prefix) else None


def _normalized_s3(address: str) -> str:
    bucket, slash, key = address.removeprefix(_S3).partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise AddressError(
            f"an S3 address is s3://bucket/key, got {address!r}: {bucket!r} is not a valid "
            f"bucket name"
        )
    key = key.removesuffix("/")  # a folder's
    if slash and key and any(part in ("", ".", "..") for part in key.split("/")):
        raise AddressError(
            f"{address}: the key contains //, . or .., which S3 and its clients interpret "
            f"differently; remedy: s3://{bucket}/{_plain(key)}"
        )
    if slash and not key and address.endswith("//"):
        raise AddressError(f"{address} has // in it; remedy: s3://{bucket}")
    return f"{_S3}{bucket}/{key}" if key else f"{_S3}{bucket}"


def _normalized_path(text: str) -> str:
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise AddressError(
            f"{text}: there is no user {text.partition('/')[0][1:]!r} with a home folder; remedy: "
            f"the full path, or ./{text} for a folder with that name"
        )
    return expanded.rstrip("/") or "/"


def _plain(key: str) -> str:
    return posixpath.normpath("/" + key).lstrip("/")


def _remedy(text: str) -> str:
    scheme, _, rest = text.partition(":")
    rest = rest.lstrip("/")
    if (data := _HUB_DATA_URL.fullmatch(text)) is not None:
        return f"remedy: for a data set on the hub, {HUB_DATA}{data[1]}"
    if (hub := _HUB_URL.fullmatch(text)) is not None:
        return f"remedy: for a model on the hub, give only its id: {hub[1]}"
    if scheme.lower() in ("s3", "s3a", "s3n"):
        return f"remedy: s3://{rest}"
    if scheme.lower() == "file":
        return f"remedy: give only the path: /{rest.removeprefix('localhost/')}"
    if scheme.lower() == "sample":
        return f"remedy: {SAMPLE}{rest}"
    return (
        f"remedy: copy it to or from a local folder or s3://bucket/key with that storage's own "
        f"tools; or, for a folder with this name, ./{text}"
    )
