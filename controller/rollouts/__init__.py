"""Gradual releases as pure decisions: what a rollout is, who is in which phase, and what to do next."""
