"""The HTTP services: request and reply types, errors, API keys."""

from gptj.environment.extras import require

require("pydantic", "gptj.serving")
require("fastapi", "gptj.serving")
require("opentelemetry.trace", "gptj.serving")
