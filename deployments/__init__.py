"""Ray Serve applications, one file per head."""

from gptj.extras import check_installed

check_installed("ray", "deployments")
