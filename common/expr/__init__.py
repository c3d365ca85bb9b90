"""The one expression language: CEL, compiled once, with bounded cost."""
