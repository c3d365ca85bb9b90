"""The pairs of models that patches are measured on, the peers they are compared with, and the bound on their size."""
