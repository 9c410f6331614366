"""Ray Serve applications, one file a head."""

from gptj.extras import check_installed

check_installed("ray", "deployments")
