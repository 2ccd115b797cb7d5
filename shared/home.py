"""Where comneck keeps what it fetches, and where a user adds profiles and catalogues of their own.

COMNECK_HOME (default: the user's cache folder)
    weights/       installed artefacts (shared/weights/store.py)
    downloads/     unfinished downloads
    profiles/      a user's own profiles, TOML files like those in shared/profiles
    catalogues/    a user's own artefacts, TOML files like shared/weights/catalogue.toml, weights beside them;
                   imported ones too (shared/weights/importing.py)
"""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """COMNECK_HOME, or ``comneck`` in the user's cache folder. It need not exist."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("COMNECK_HOME")
    return Path(chosen).expanduser() if chosen else user_cache_path("comneck", appauthor=False)
