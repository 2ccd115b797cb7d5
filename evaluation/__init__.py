"""Measuring what is lost on the way: the same photos as pixels and as bitstreams, side by side."""
