"""Training of encoders: simulated snippets in, an ONNX file with its contract out.

Needs the extra `streamsort[train]` (torch, onnx, onnxscript); nothing in the live sorter imports from here.
"""
