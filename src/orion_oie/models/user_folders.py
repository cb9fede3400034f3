"""The folders of this library in the user's home, as the platform has them."""

from pathlib import Path

from platformdirs import user_cache_path, user_config_path

_APP = "orion-oie"


def cache_folder() -> Path:
    """The folder of fetched models, unless `ORION_CACHE_DIR` names another one."""
    return user_cache_path(_APP, appauthor=False)


def registry_file() -> Path:
    """The user's own registry, which need not exist."""
    return user_config_path(_APP, appauthor=False) / "models.json"
