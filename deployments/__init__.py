"""Ray Serve applications, one file per head."""

from gptj.environment.extras import check_installed

check_installed("ray", "deployments")
