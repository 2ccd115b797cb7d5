"""The cloud: answers questions about photos that arrive as bitstreams."""
