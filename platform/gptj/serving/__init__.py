"""What the deployments share: request and reply types, errors, keys, batching."""

from gptj.extras import require

require("pydantic", "gptj.serving")
require("fastapi", "gptj.serving")
