#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of eight minutes, without internet or Ray:
#
#     tests/gpu/check.sh OUT [--wheels DIR] [--only PART,PART] [--seconds 470] [--rehearse]
#
# OUT gets results.jsonl (a line for each measurement, the moment it is there), report.md and log.txt,
# and no more than a few MB. DIR has the wheels of what the machine lacks: tests/gpu/wheels.py makes
# it. --rehearse runs the same on a CPU, with tiny shapes and Triton's interpreter. CONTRIBUTING.md
# says more; the parts are listed in tests/gpu/check.py.
exec "${PYTHON:-python3}" -u "$(dirname "$0")/check.py" "$@"
