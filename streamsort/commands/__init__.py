"""What the command line does, one module per command, each with a `main(args) -> exit code`.

`streamsort.cli` parses and imports only the module it needs, so that `--help` is there at once.
"""
