"""A folder that is written from a plan in steps, by processes that may be killed.

Its subfolder `unfinished` has the plan, and a record for each step that is done; a later process
with the same plan resumes from there. `index.json` and a manifest are written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gptj import storage
from gptj.data.rows import DataError
from gptj.serialization.json_object import parse_object

UNFINISHED = "unfinished"
PLAN = "plan.json"
INDEX = "index.json"


def claim(folder: str, plan: str) -> Mapping[str, Any]:
    """The plan of the unfinished folder; a new folder gets this one, in JSON.

    DataError if the folder has other files.
    """
    if (begun := begun_plan(folder)) is not None:
        return begun
    check_unused(folder)
    address = storage.join(folder, UNFINISHED, PLAN)
    storage.write_bytes(address, plan.encode())
    # Read again: another process may have written its own at the same time.
    return parse_object(storage.read_bytes(address), address)


def check_unused(folder: str) -> None:
    """DataError if a folder without a plan has files of something else."""
    names = (file.name for file in storage.list_files(folder))
    if others := [name for name in names if not name.startswith(f"{UNFINISHED}/")]:
        raise DataError(f"{folder} has other files, such as {others[0]}: choose a new one")


def begun_plan(folder: str) -> Mapping[str, Any] | None:
    """The plan of an unfinished folder; None if it is not one."""
    address = storage.join(folder, UNFINISHED, PLAN)
    try:
        return parse_object(storage.read_bytes(address), address)
    except storage.NotFoundError:
        return None


def read_record(folder: str, name: str) -> Mapping[str, Any] | None:
    """The record of a step; None if it is not done."""
    address = _record(folder, name)
    try:
        return parse_object(storage.read_bytes(address), address)
    except storage.NotFoundError:
        return None


def write_record(folder: str, name: str, fields: Mapping[str, Any]) -> None:
    storage.write_bytes(_record(folder, name), json.dumps(fields).encode())


def _record(folder: str, name: str) -> str:
    return storage.join(folder, UNFINISHED, f"{name}.json")


def delete_records(folder: str) -> None:
    """Delete the plan and the records of a finished folder."""
    storage.delete_folder(storage.join(folder, UNFINISHED))


def check_same_plan(folder: str, different: Iterable[str]) -> None:
    """DataError if a folder's plan differs in some fields."""
    if names := ", ".join(different):
        raise DataError(
            f"{folder} was started with different {names}: choose another folder, or delete this "
            f"one"
        )


def other_rows(folder: str, address: str) -> DataError:
    """The error for a finished folder if the rows at its plan's address have changed since."""
    return DataError(
        f"{folder} was made from other rows than {address} has now: choose another folder, or "
        f"delete this one"
    )


def length(value: Any) -> int:
    """Length in characters; anything but text is measured as JSON. Types are checked later."""
    return len(value) if isinstance(value, str) else len(json.dumps(value, default=str))
