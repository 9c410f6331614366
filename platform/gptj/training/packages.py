"""Check early that the optional packages required by a run's settings are installed."""

from __future__ import annotations

from gptj.environment.extras import MissingPackageError, check_installed
from gptj.training.settings import Settings, SettingsError


def check_packages(settings: Settings) -> None:
    """SettingsError, naming the setting, the package and how to install it."""
    quantized = settings.adapter is not None and settings.adapter.quantization is not None
    needed = {
        "adapter.quantization": ("bitsandbytes", "train", quantized),
        "optimizer.moments=8bit": ("bitsandbytes", "train", settings.optimizer.moments == "8bit"),
        "tracking.mlflow": ("mlflow", "trackers", bool(settings.tracking.mlflow)),
        "tracking.wandb": ("wandb", "trackers", bool(settings.tracking.wandb)),
    }
    for setting, (package, extra, wanted) in needed.items():
        if wanted:
            try:
                check_installed(package, setting, extra)
            except MissingPackageError as error:
                raise SettingsError(str(error)) from error
