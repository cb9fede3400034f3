"""All models that other programs have on this machine, in one list. Reads names, not contents."""

from orion_oie.models.local.found import (
    Found,
    LocalModel,
)
from orion_oie.models.local.hub_cache import hub_cache_models
from orion_oie.models.local.lm_studio import lm_studio_models
from orion_oie.models.local.ollama import ollama_models


def survey() -> Found:
    """The models of all programs, and what lies in their folders but is unusable, with the reason.

    Raises nothing, and looks at a bounded number of files.
    """
    return Found.together((ollama_models(), lm_studio_models(), hub_cache_models()))


def local_models() -> list[LocalModel]:
    """The models of all programs on this machine."""
    return list(survey().models)
