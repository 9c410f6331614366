"""Where chat templates come from: a built-in name, or a file's address."""

from __future__ import annotations

from importlib.resources import files

from gptj import storage
from gptj.chat.errors import ChatTemplateError
from gptj.storage.addresses import normalized

# Compiling takes up to a second for so much. Published templates have less than half of it.
MAX_BYTES = 2**16

# For chat-tuned GPT-Js without their own template, following their training data.
READY = {
    "alpaca": "Stanford Alpaca's instructions; a reply ends with eos",
    "dolly": "databricks/dolly-v1-6b: the same, where a reply ends with ### End",
    "gpt-jt": "togethercomputer/GPT-JT-6B-v1: Input: and Output:",
    "pygmalion": "PygmalionAI/pygmalion-6b: a persona and a dialogue",
}


def read_template(name_or_address: str) -> str:
    """The source of a built-in template, or of a file at a local or `s3://` address.

    Raises:
        ChatTemplateError: if there is no such name or file, or it is not UTF-8.
        gptj.storage.StorageError: if the file cannot be read.
    """
    if name_or_address in READY:
        return (files("gptj.chat") / "ready" / f"{name_or_address}.jinja").read_text()
    address = normalized(name_or_address)
    try:
        content, size = storage.read_start(address, MAX_BYTES)
    except storage.NotFoundError as error:
        raise ChatTemplateError(
            f"{name_or_address} is neither a file nor a built-in chat template; there are "
            f"{', '.join(READY)}"
        ) from error
    check_size(size, address)
    return decoded(content, address)


def check_size(size: int, name: str) -> None:
    """Of a template's source in bytes. Raises ChatTemplateError."""
    if size > MAX_BYTES:
        raise ChatTemplateError(
            f"{name} has {size} bytes, but a chat template may have at most {MAX_BYTES}: shorten "
            f"it, such as by macros for what is repeated"
        )


def decoded(content: bytes, address: str) -> str:
    """A template's file as text. Raises ChatTemplateError if it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ChatTemplateError(f"{address} is not a chat template in UTF-8: {error}") from error
