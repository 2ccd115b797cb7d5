"""Codecs by name. Other packages add theirs through the entry point group ``comneck.codecs``."""

from shared.registry import Registry

codecs = Registry("codec", "comneck.codecs", {"elic-chandelier": "shared.codecs.elic:Elic"})
