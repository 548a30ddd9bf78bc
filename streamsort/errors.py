"""The one exception a user of streamsort has to know.

Everything a caller or an artifact can get wrong (a config value, a probe that does not fit, a model whose contract is broken, a
recording that is cut short) ends as a `StreamsortError` whose message is one line: what it is about, the value found, the value
expected. The command line prints that line and exits with 2. What the world does wrong on a live stream is never an exception: it
is a `Gap`, a flag on the spikes and a counter in the status.
"""


class StreamsortError(ValueError):
    """Report a mistake in what streamsort was given; the message is one line and says what was expected."""
