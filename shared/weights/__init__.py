"""Weights: what there is (catalogue), how to get it (fetch, convert) and where it lies on this machine (store)."""

from shared.weights.store import Store, ensure, path

__all__ = ["Store", "ensure", "path"]
