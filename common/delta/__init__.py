"""Patches: bytes that rebuild a target file from a base file, bit for bit."""
