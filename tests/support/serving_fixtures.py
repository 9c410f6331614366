"""Fixtures of the tests of services. Not in conftest.py, since they take seconds to import.

A module that uses them says `pytest_plugins = ["serving_fixtures"]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import huggingface_hub
import openai
import pytest
from serving_models import Models, make_models, served_in_process


@pytest.fixture(scope="session")
def models() -> Models:
    """Tiny models with random weights; nobody changes them."""
    return make_models()


@pytest.fixture(scope="session")
def service(models: Models) -> Iterator[str]:
    """The address of the three services in this process, and of two more: see the models."""
    with served_in_process(models) as address:
        yield address


@pytest.fixture
def client(service: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's client asks our service, though the tests ask no hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
