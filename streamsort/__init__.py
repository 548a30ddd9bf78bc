"""streamsort: a live multi-electrode voltage stream in, unit ids out, a few milliseconds after each spike."""

__version__ = "0.1.0"
