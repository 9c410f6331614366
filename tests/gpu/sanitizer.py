"""Compute-sanitizer over the kernels' tests, if there is one."""

from __future__ import annotations

import re
import shutil

from checking import Check, run
from results import Row
from suite import GRACE_SECONDS, REHEARSED, judged, run_tests

FILES = (
    *("test_cuda_kernels", "test_cuda_fp8", "test_cuda_fp8_cache"),
    *("test_cuda_sampling", "test_cuda_quantized"),
)
# Tests of hundreds of launches, each of which is instrumented; and of runners, whose graphs cannot
# be captured without PyTorch's own pieces of memory.
LEFT_OUT = (
    "every_candidate or vocabulary or probabilities or steps_compute or adapters_are or runner"
    " or rows_decode or prefix_caching or takes_a_byte or gemv"
)
# Kernels of PyTorch and its libraries, which warn of races in their own shared memory: no argument
# of ours can cause one, while an access out of bounds can be ours in any kernel.
NOT_OURS = ("fmha", "cutlass", "cublas", "gemm", "at::")
TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": (),
    # PyTorch's attention, with which the tests compare ours: most of the hazards and of the time.
    "racecheck": ("--kernel-name-exclude", "kns=fmha"),
}


def main(check: Check) -> None:
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        check.add("compute-sanitizer", missing="compute-sanitizer is not installed here")
        return
    for tool, options in TOOLS.items():
        if check.late("compute-sanitizer", 10, tool=tool):
            continue
        before = (program, "--tool", tool, *options, "--target-processes", "all")
        ran = run_tests(
            check,
            FILES[:1] if check.rehearsal else FILES,
            REHEARSED if check.rehearsal else f"not ({LEFT_OUT})",
            check.seconds_left - 2 - GRACE_SECONDS,  # the first tool shows more
            before=before,
            # Else most of what is wrong is still inside of PyTorch's own pieces of memory.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        found = findings(ran.output)
        right = ran.right
        if found["sanitizer_errors"] or found["races"]:
            right = False
        elif found["sanitizer_errors"] is None and ran.exit_code is not None:
            right = False  # it has checked nothing
        values = {"tool": tool, "command": " ".join(before), **judged(right)}
        check.add("compute-sanitizer", **ran.row, **found, **values)


def findings(output: str) -> Row:
    """What a tool's output says: errors, None without a summary, and races in kernels of ours.

    A race is an error or, if the values do not differ, a warning.
    """
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    summaries += re.findall(r"RACECHECK SUMMARY: .*\((\d+) errors?,", output)
    races = re.findall(r"Race reported between .*? access at (.*)", output)
    ours = [name for name in races if not any(other in name.lower() for other in NOT_OURS)]
    return {
        "sanitizer_errors": sum(map(int, summaries)) if summaries else None,
        "races": sorted({re.split(r"[(+ ]", name)[0] for name in ours}),
        "races_elsewhere": len(races) - len(ours),
    }


if __name__ == "__main__":
    run(main)
