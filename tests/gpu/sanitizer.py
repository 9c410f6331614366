"""Part 9, the end: compute-sanitizer over the kernels' tests, if there is one."""

from __future__ import annotations

import shutil

from checking import Check, run
from suite import run_tests

TOOLS = ("memcheck", "racecheck")
TOO_SLOW = "gemv"  # tests of hundreds of launches, each of which is instrumented


def main(check: Check) -> None:
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        check.add("compute-sanitizer", missing="compute-sanitizer is not installed here")
        return
    tools = check.pick(TOOLS, TOOLS[:1])
    for number, tool in enumerate(tools):
        if check.late("compute-sanitizer", 15, tool=tool):
            continue
        left = len(tools) - number
        run_tests(
            check,
            "compute-sanitizer",
            ("test_cuda_kernels",),
            "copied_pages" if check.rehearsal else f"not {TOO_SLOW}",
            (check.seconds_left - 4) / left,
            before=(program, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"),
            # Else most of what is wrong is still inside of PyTorch's own pieces of memory.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )


if __name__ == "__main__":
    run(main)
