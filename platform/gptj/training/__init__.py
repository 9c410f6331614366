"""The training loop: settings, steps, evaluation, checkpoints and resume."""

from gptj.environment.extras import require

require("pydantic", "gptj.training")
