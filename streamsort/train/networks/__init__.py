"""Encoders that can be trained; each file holds one, read top to bottom."""
