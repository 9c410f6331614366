"""Between models and their folders: the base class of the model and its heads, loading, saving."""

from __future__ import annotations

from gptj.pretrained.base import GPTJPreTrainedModel

__all__ = ["GPTJPreTrainedModel"]
