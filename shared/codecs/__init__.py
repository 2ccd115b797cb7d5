"""Codecs by name. Other packages add theirs through the entry point group ``comneck.codecs``: see interface.py."""

from shared.registry import Registry

codecs = Registry(
    "codec",
    "comneck.codecs",
    {
        "elic-chandelier": "shared.codecs.elic:chandelier",
        "elic-official": "shared.codecs.elic:official",
        "tic": "shared.codecs.tic:build",
    },
)
