"""The GPU check, rehearsed: the whole of it on the CPU, with tiny shapes and Triton's interpreter.

It runs as on the machine that it is for: without whatever is missing there.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from triton.runtime.jit import KernelInterface

REPOSITORY = Path(__file__).resolve().parents[2]
GPU = REPOSITORY / "tests" / "gpu"
sys.path.insert(0, str(GPU))

import attention  # noqa: E402
import check  # noqa: E402
import checking  # noqa: E402
import fp8  # noqa: E402
import models  # noqa: E402
import outcomes  # noqa: E402
import report  # noqa: E402
import sanitizer  # noqa: E402
import steps  # noqa: E402
import suite  # noqa: E402
import wheels  # noqa: E402
from results import Results, Row, read  # noqa: E402

from gptj.engine.runners.cuda import kernels, launch  # noqa: E402

# Programs that a machine without a GPU lacks, as far as the check looks at them.
PROGRAMS = {
    "nvidia-smi": "echo 'A card, 580.1, 81559 MiB, 1980 MHz, 2619 MHz, 700.00 W'",
    # The part `suite` has run the same command without it.
    "compute-sanitizer": 'while [ "$1" != "${1#--}" ]; do shift 2; done\n'
    'test -x "$1" -a "$2 $3" = "-m pytest" && echo "========= ERROR SUMMARY: 0 errors"',
}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("check")
    programs = folder / "bin"
    programs.mkdir()
    for name, script in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    result = subprocess.run(
        [str(GPU / "check.sh"), str(folder / "out"), "--rehearse", "--seconds", "540"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        cwd=folder,  # it need not be started from the repository
    )
    return folder / "out", result


@pytest.mark.slow
def test_every_part_of_the_gpu_check_passes(
    rehearsed: tuple[Path, subprocess.CompletedProcess],
) -> None:
    out, result = rehearsed
    rows = read(out)
    outcomes = {row["of"]: row["outcome"] for row in rows if row["what"] == "part"}
    assert outcomes == {part.name: "done" for part in check.PARTS}, result.stdout[-3000:]
    assert [row for row in rows if "error" in row or row.get("right") is False] == []
    assert result.returncode == 0
    assert sum("right" in row for row in rows) > 40


@pytest.mark.slow
def test_each_figure_records_its_settings(
    rehearsed: tuple[Path, subprocess.CompletedProcess],
) -> None:
    rows = read(rehearsed[0])

    def the(what: str) -> list[Row]:
        return [row for row in rows if row["what"] == what]

    assert {row["engine"] for row in the("decode")} == {"gptj", "transformers"}
    for row in the("decode"):
        assert row["tokens_per_s"] > 0
        assert row["batch"]
        assert row["new_tokens"]
        assert row["repeats"]
    for row in the("prefill"):
        assert row["share_of_matrix_peak"] > 0
        assert row["tokens"]
        assert row["repeats"]
    assert [row["dtype"] for row in the("beams")] == ["fp16", "fp8", fp8.WITH_CACHE]
    for row in the("beams"):
        assert (row["beams"], row["samples_per_s"] > 0) == (4, True)
    assert {row["when"] for row in the("pauses")} == {"alone", "with long prompts"}
    kinds = {row["kind"].split(",")[0] for row in the("product")}
    assert kinds == {"fp16"}
    assert {row["kind"] for row in the("fp8 product")} > {"cuBLAS", "cuBLAS, fast sums"}
    ways = [(row["cache"], row["way"]) for row in the("attention of single tokens")]
    assert [each for each in ways if "ours, " in each[1]] == [
        (cache, f"ours, {changes}")
        for cache, tuned in (("fp8", attention.TUNED_FP8), ("fp16", attention.TUNED_SINGLES))
        for changes in (*tuned[:1], *attention.LAUNCHED_SINGLES[:1])
    ]
    assert {row["cache"] for row in the("attention of groups")} == {"fp16", "fp8"}
    assert the("prefill step")[0]["kernels"]
    assert the("host time")[0]["functions"]
    assert {row["variant"] for row in the("training")} >= {"stage 2, fp32", "LoRA"}
    assert {row["tool"] for row in the("compute-sanitizer")} == set(sanitizer.TOOLS)
    assert [row["sanitizer_errors"] for row in the("compute-sanitizer")] == [0, 0]
    assert the("card")[0]["driver_version"] == "580.1"


@pytest.mark.slow
def test_results_stay_small_and_the_report_names_card_and_goals(
    rehearsed: tuple[Path, subprocess.CompletedProcess],
) -> None:
    out, result = rehearsed
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(path.parent == out for path in files)
    assert all(path.stat().st_size < 16 * 2**20 for path in files)
    text = (out / report.REPORT).read_text()
    assert text.startswith("# GPU check: A card (rehearsed on a CPU)")
    assert text[:2000] in result.stdout
    for goal in report.GOALS.values():
        assert goal in text
    assert "not measured" not in text.split("decode 1: ")[1].splitlines()[0]


@pytest.mark.slow
def test_a_part_that_crashes_or_hangs_is_recorded_and_the_next_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = {
        "crashing": "import os; print('on the way', flush=True); os.abort()",
        "raising": "raise ValueError('what was wrong')",
        "hanging": "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
        "working": "import sys\nfrom pathlib import Path\nfrom results import Results\n"
        "Results(Path(sys.argv[1]), 'working').add('a figure', right=True, share=float('nan'))",
        "late": "raise SystemExit('it was not to run')",
    }
    for name, script in scripts.items():
        (tmp_path / f"{name}.py").write_text(script)
    (tmp_path / "results.py").write_text((GPU / "results.py").read_text())
    seconds = {"hanging": 2}
    parts = tuple(check.Part(name, seconds.get(name, 30)) for name in scripts)
    monkeypatch.setattr(check, "PARTS", parts)
    monkeypatch.setattr(check, "HERE", tmp_path)
    monkeypatch.setattr(check, "MIN_SECONDS", 1)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(check, "PARTS", parts[:-1])
        assert check.main([str(out), "--seconds", "100"]) == 1
    rows = read(out)
    found = {row["of"]: row for row in rows if row["what"] == "part"}
    assert found["crashing"]["outcome"] == "failed"
    assert found["crashing"]["exit_code"] == -6
    assert "on the way" in found["crashing"]["log"]
    assert "ValueError: what was wrong" in found["raising"]["log"]
    assert found["hanging"]["outcome"] == "time-out"
    assert found["working"]["outcome"] == "done"
    assert [row["share"] for row in rows if row["what"] == "a figure"] == ["nan"]
    assert check.main([str(out), "--seconds", "0.5", "--only", "late"]) == 1
    assert [row["outcome"] for row in read(out) if row["what"] == "part"] == ["no time left"]


def limits(names: Sequence[str], seconds: float, share: float) -> dict[str, float]:
    """Of parts that take a share of what is usual."""
    parts = [part for part in check.PARTS if part.name in names]
    found = {}
    for number, part in enumerate(parts):
        found[part.name] = check.limit_of(part, parts[number + 1 :], seconds)
        seconds -= min(found[part.name], share * part.usual)
    return found


def test_each_part_has_its_usual_time_and_slow_ones_leave_some_to_the_others() -> None:
    """In all the eight minutes that it may take, and in less with some of the parts."""
    usual = {part.name: part.usual for part in check.PARTS}
    for share in (0.5, 1):
        for name, limit in limits(list(usual), 470, share).items():
            assert limit >= usual[name]
    few = ("suite", "operators", "training", "sanitizer")
    for name, limit in limits(few, 150, 2).items():  # each takes all that it gets
        assert 0.6 * usual[name] < limit <= usual[name]
    assert limits(few[:1], 150, 1) == {"suite": 110}


@pytest.mark.slow
def test_an_incompatible_wheel_does_not_keep_the_others_from_installing(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "broken-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    _write_wheel(folder / "whole-1.0-py3-none-any.whl")
    results = Results(tmp_path, "check")
    with open(tmp_path / "log.txt", "ab", buffering=0) as log:
        check._install(folder, tmp_path / "site", results, log)
    (row,) = results.all()
    assert (row["count"], row["failed"]) == (2, ["broken-1.0-py3-none-any.whl"])
    assert (tmp_path / "site" / "whole.py").read_text() == "here = True\n"


def test_a_truncated_line_is_skipped(tmp_path: Path) -> None:
    results = Results(tmp_path, "speed")
    results.add(
        "decode", batch=1, tokens_per_s=123.456789, engine="gptj", max_num_batched_tokens=512
    )
    results.add("decode", batch=1, error="OutOfMemoryError: none left")
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"part": "speed", "what": "dec')
    rows = read(tmp_path)
    assert [row.get("tokens_per_s") for row in rows] == [123.5, None]
    assert not results.good()
    text = report.write(tmp_path)
    assert "| 123.5 |" in text
    assert "OutOfMemoryError: none left" in text
    assert (
        "| decode 64: 8,000 tokens/s or more (TensorRT-LLM in fp8: 10,907) | not measured |" in text
    )


PROBE = """
import importlib.util
from importlib import metadata

import deepspeed, numpy, torch, transformers, xdist  # as there, or from a wheel
from huggingface_hub import HfApi  # which needs httpx2

assert importlib.util.find_spec("ray") is None
try:
    metadata.version("boto3")
except metadata.PackageNotFoundError:
    pass
else:
    raise AssertionError("boto3 was found")
for missing in ("import ray", "from pyarrow import parquet"):
    try:
        exec(missing)
    except ModuleNotFoundError:
        continue
    raise AssertionError(missing)
import httpx2  # may be imported by others
try:
    exec("import httpx2", {"__file__": FILE})
except ModuleNotFoundError as error:
    assert error.name == "httpx2"
else:
    raise AssertionError("a module of ours imported httpx2")
"""


@pytest.mark.slow
def test_a_rehearsal_hides_the_packages_that_the_machine_lacks(tmp_path: Path) -> None:
    ours = REPOSITORY / "platform" / "gptj" / "data" / "hub.py"
    (tmp_path / "probe.py").write_text(PROBE.replace("FILE", repr(str(ours))))
    result = subprocess.run(
        [sys.executable, str(tmp_path / "probe.py")],
        env={**os.environ, **check._as_on_the_machine(os.environ.get("PYTHONPATH", ""))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_every_wheel_is_pinned_by_the_constraints() -> None:
    for package in (*wheels.PACKAGES, *wheels.BUILT):
        assert wheels.pinned(package).count("==") == 1


def test_tests_selected_by_name_exist() -> None:
    """A renamed test must not drop out of the check, nor a slow one into it."""
    names: list[str] = []
    for file in sanitizer.FILES:
        text = (REPOSITORY / "tests" / "engine" / f"{file}.py").read_text()
        names += re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    for part in (*sanitizer.LEFT_OUT.split(" or "), suite.REHEARSED, "compile_for"):
        assert any(part in name for name in names), part


@pytest.mark.slow
def test_the_suite_selects_the_gpus_cases_and_runs_kernels_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTJ_CHECK_REHEARSE", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")
    each = checking.Check("suite", tmp_path)
    ran = suite.run_tests(each, suite.FILES, suite.NAMES, 100)
    lines = [line for line in ran.output.splitlines() if "::" in line]
    files = list(dict.fromkeys(Path(line.partition("::")[0]).stem for line in lines))
    assert files == list(suite.FILES)
    assert len(lines) > 80
    for case in (
        *("test_runs_on_every_device[cuda]", "chunks[triton fp16-wide heads]", "alone[cuda-plain]"),
        *("without_synchronizing[torch]", "exceed_fp16[cuda]", "[cuda-causal-lm-dtype0]"),
    ):
        assert any(line.endswith(case) for line in lines), case
    of_others = [line for line in lines if "test_cuda" not in line]
    assert not [line for line in of_others if "[cpu" in line or "int4" in line]


SUITE = """
import pytest, time

def test_good(): pass

def test_wrong():
    assert 1 + 1 == 3, "a sum"

@pytest.fixture
def broken(): raise OSError("no device")

def test_without_its_fixture(broken): pass

def test_skipped(): pytest.skip("not here")

def test_hanging():
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("xdist", [False, True])
def test_failures_of_a_suite_that_runs_out_of_time_are_recorded(
    xdist: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests" / "some").mkdir(parents=True)
    (tmp_path / "tests" / "some" / "test_first.py").write_text(SUITE)
    monkeypatch.setattr(suite, "REPOSITORY", tmp_path)
    monkeypatch.setattr(suite, "GRACE_SECONDS", 1)
    monkeypatch.setattr(suite, "WORKERS", 2)
    monkeypatch.setenv("GPTJ_CHECK_REHEARSE", "1")
    each = checking.Check("suite", tmp_path)
    each.rehearsal = not xdist
    started, wait = subprocess.Popen, suite._wait
    found: list[Path] = []

    def start(*command: Any, env: dict[str, str], **names: Any) -> subprocess.Popen[bytes]:
        found.append(Path(env[outcomes.OUTCOMES]))
        return started(*command, env=env, **names)

    def end_time(process: subprocess.Popen[bytes], seconds: float) -> int | None:
        """Only the hanging test is left, however long the others took."""
        while not found[0].exists() or found[0].read_text().count("\n") < 4:
            assert process.poll() is None
            time.sleep(0.1)
        return wait(process, 0)

    monkeypatch.setattr(suite.subprocess, "Popen", start)
    monkeypatch.setattr(suite, "_wait", end_time)
    ran = suite.run_tests(each, ("test_first",), "test", 60)
    assert (ran.exit_code, ran.right) == (None, False)
    counts = {name: ran.row[name] for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 4, "failures": 1, "errors": 1, "skipped": 1}
    rows = [row for row in read(tmp_path) if row["what"] == "failed test"]
    assert {row["test"].partition("::")[2] for row in rows} == {
        *("test_wrong", "test_without_its_fixture")
    }
    (wrong,) = [row for row in rows if row["test"].endswith("test_wrong")]
    assert wrong["message"].startswith("test_first.py:7: AssertionError: a sum")
    assert (wrong["part"], wrong["right"]) == ("suite", False)
    assert "no device" in str(ran.row["failed_tests"])


@pytest.mark.slow
def test_a_test_file_that_cannot_be_imported_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests" / "some").mkdir(parents=True)
    (tmp_path / "tests" / "some" / "test_first.py").write_text("import no_such_module")
    monkeypatch.setattr(suite, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GPTJ_CHECK_REHEARSE", "1")
    ran = suite.run_tests(checking.Check("suite", tmp_path), ("test_first",), "test", 60)
    assert ran.right is False
    (row,) = [row for row in read(tmp_path) if row["what"] == "failed test"]
    assert "No module named 'no_such_module'" in row["message"]


FMHA = "fmha_cutlassF_f32_aligned_32x128_gmem_sm80(PyTorchMemEffAttention::Params)+0xbce0"
# As version 2025.3.1 writes them.
RACES = """========= COMPUTE-SANITIZER
.............========= Warning: Race reported between Write access at {0}
=========     and Write access at {0} [4096 hazards]
=========
....................                                        [100%]
33 passed, 7 deselected in 26.27s
========= RACECHECK SUMMARY: {1}
"""


@pytest.mark.parametrize(
    ("output", "errors", "races", "elsewhere"),
    [
        ("........= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0, [], 0),
        ("========= ERROR SUMMARY: 1 error\n", 1, [], 0),
        (RACES.format(FMHA, "16 hazards displayed (0 errors, 16 warnings)"), 0, [], 1),
        (
            RACES.format("lora_shrink+0x10", "1 hazard displayed (1 error, 0 warnings)"),
            *(1, ["lora_shrink"], 0),
        ),
        ("No such file or directory", None, [], 0),
    ],
    ids=["memcheck", "an error", "PyTorch's race", "our race", "did not run"],
)
def test_the_sanitizers_findings_are_those_of_our_kernels(
    output: str, errors: int | None, races: list[str], elsewhere: int
) -> None:
    assert sanitizer.findings(output) == {
        "sanitizer_errors": errors,
        "races": races,
        "races_elsewhere": elsewhere,
    }


def test_our_kernels_are_not_taken_for_others() -> None:
    names = [name for name, each in vars(kernels).items() if isinstance(each, KernelInterface)]
    assert names
    assert not [name for name in names if any(other in name for other in sanitizer.NOT_OURS)]


def test_constants_that_are_tried_exist() -> None:
    """No rehearsal tries them all."""
    for name, tried in (
        (attention.DECODE_KERNEL, (*attention.TUNED_SINGLES, *attention.TUNED_FP8)),
        (attention.PROMPT_KERNEL, attention.TUNED_CHUNKS),
    ):
        constants = {*inspect.signature(vars(kernels)[name].fn).parameters, *attention.OPTIONS}
        for changes in tried:
            assert set(changes) <= constants, (name, changes)
    for changes in attention.LAUNCHED_SINGLES:
        assert set(changes) <= set(vars(launch))


@pytest.mark.slow
def test_constants_that_change_nothing_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a kernel or its constant was renamed: all variants measured the same."""
    monkeypatch.setenv("GPTJ_CHECK_REHEARSE", "1")
    each = checking.Check("operators", tmp_path)
    layer = attention.Layer(each, 8)
    attend = layer.attending(layer.inputs([1, 1], [20, 3]))
    seen: list[dict[str, object]] = []
    kernel = vars(kernels)[attention.DECODE_KERNEL]
    launching, changes = kernel.run, attention.TUNED_SINGLES[0]

    def run(*arguments: object, **names: object) -> object:
        seen.append(names)
        return launching(*arguments, **names)

    monkeypatch.setattr(kernel, "run", run)
    attend()
    with attention.overriding(attention.DECODE_KERNEL, changes):
        attend()
    usual, changed = seen
    assert changed == {**usual, **changes} != usual
    with (
        pytest.raises(LookupError, match="no kernel attend was launched"),
        attention.overriding("attend", changes),
    ):
        attend()
    with (
        pytest.raises(LookupError, match=f"{attention.DECODE_KERNEL} has no DEPTH"),
        attention.overriding(attention.DECODE_KERNEL, {"DEPTH": 1}),
    ):
        attend()
    monkeypatch.setattr(attention, "DECODE_KERNEL", "attend")
    attention.decode(each, layer, 2, 20, attention.TUNED_SINGLES[:1])
    errors = [row for row in read(tmp_path) if "error" in row]
    assert [row["way"] for row in errors] == [f"ours, {attention.TUNED_SINGLES[0]}"]
    assert not any("ms" in row for row in errors)


@pytest.mark.slow
def test_profiled_steps_decode_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their prompts take several steps, so that sequences do not end together."""
    monkeypatch.setenv("GPTJ_CHECK_REHEARSE", "1")
    each = checking.Check("steps", tmp_path)
    runner = models.new_runner(each, models.new_model(each, each.config(), torch.float16), 64)
    sizes: list[int] = []
    found: list[int] = []
    step = runner.step
    runner.step = lambda batch: sizes.append(len(batch.ids_T)) or step(batch)

    def traced(check: object, function: Callable[[], object], name: str) -> list[Row]:
        before = len(sizes)
        function()
        found.extend(sizes[before:])
        return []

    monkeypatch.setattr(steps, "traced", traced)
    steps.decoding(each, runner, 5)
    runner.close()
    assert any(size > 5 for size in sizes)  # prompts
    assert set(found) == {5}
    assert len(found) in (2, 3)  # one may be computed ahead


def test_names_used_only_on_a_gpu_exist() -> None:
    """Lines that no rehearsal reaches, against PyTorch's names."""
    cuda = mock.create_autospec(torch.cuda)
    cuda.mem_get_info.return_value = (60 * 10**9, 80 * 10**9)
    for name in ("memory_allocated", "memory_reserved"):
        getattr(cuda, name).return_value = 10**9
        getattr(cuda, f"max_{name}").return_value = 2 * 10**9
    cuda.Event.return_value.elapsed_time.return_value = 30.0
    calls = []
    with mock.patch.object(torch, "cuda", cuda):
        device = checking.Cuda()
        device.synchronize()
        assert device.seconds(lambda: calls.append(1), 3) == pytest.approx(0.01)
        assert device.memory()["free_gb"] == 60
        assert device.memory()["peak_reserved_gb"] == 2
        device.reset_peak()
        device.empty()
        assert len(calls) == 3
        device.captured(lambda: calls.append(1))()
    assert len(calls) == 5  # once to compile, once to capture
    assert cuda.CUDAGraph.return_value.replay.call_count == 1


def test_a_measurements_error_is_recorded_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTJ_CHECK_REHEARSE", "1")
    each = checking.Check("speed", tmp_path)
    with each.attempt("decode", batch=256):
        raise torch.OutOfMemoryError("CUDA out of memory")
    (row,) = read(tmp_path)
    assert (row["batch"], row["error"]) == (256, "OutOfMemoryError: CUDA out of memory")


def _write_wheel(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("whole.py", "here = True\n")
        wheel.writestr("whole-1.0.dist-info/METADATA", "Name: whole\nVersion: 1.0\n")
        wheel.writestr(
            "whole-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: none\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("whole-1.0.dist-info/RECORD", "")
