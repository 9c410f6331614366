"""The training loop: settings, steps, evaluation, checkpoints and resume."""

from gptj.extras import require

require("pydantic", "gptj.training")
