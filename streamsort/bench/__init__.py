"""`streamsort bench`: what a rig and a recording make of the sorter, measured from outside.

Processes as in an experiment: a player that sends the recording over LSL or ZeroMQ (`roles.play`, `played`), the very
`streamsort run`, and a subscriber that notes when each spike is in its hands (`roles.receive`). A loop that only sleeps
(`roles.idle`) shows what the machine itself adds. `conduct` starts them and leads them through phases: clean, one for each
`--fault` (`faults`, `burst`), then faster and faster. `figures` makes numbers of what they noted, `result` a report of these, and
`show` and `picture` what is looked at.
"""
