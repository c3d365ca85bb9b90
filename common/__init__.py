"""What the controller and the agent both speak: names, messages, manifests, patches, signatures, expressions.

Everything here is pure (no IO, no clock, no randomness of its own) except five small shells that both programs need
and neither owns: `clock` (the only reader of time), `durable` (the one way to write a file), `filesource` (random
access to one), `settings` and `observability` (logs and traces). The pure modules must not import those; an import
contract keeps it so.
"""
