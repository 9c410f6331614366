"""The README's picture of a training: python tests/support/loss_curve.py [FILE]

The loss curve that jobs/finetune.py writes, of a language model of half a million parameters in
200 steps: a minute on two cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from gptj.training.progress import CURVE
from gptj_local.ray import LocalRay

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / ".github" / "pictures" / "loss.png"
SETTINGS = (
    *("run=finetune", "steps=200", "log_every=5", "evaluate_every=25", "checkpoint_every=200"),
    *("batch_size=16", "micro_batch_size=16", "data.sequence_length=128", "workers.count=1"),
    *("optimizer.learning_rate=0.002", "optimizer.warmup_steps=20"),
)


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    with TemporaryDirectory() as name, LocalRay.start(Path(name), cpus=2) as ray:
        subprocess.run(
            [sys.executable, ROOT / "jobs/finetune.py", f"storage={name}", *SETTINGS],
            env={**os.environ, **ray.environment()},
            cwd=ROOT,
            check=True,
        )
        shutil.copyfile(Path(name) / "finetune" / CURVE, target)


if __name__ == "__main__":
    main()
