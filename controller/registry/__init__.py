"""The registry: bytes by digest (`blobs`), signed releases of them (`releases`), patches between them (`patches`).

Bytes come first and names after: a file is complete, checked and durable before any row in the store speaks of it, so
that a crash leaves at most bytes that nobody refers to. Garbage collection takes those away.
"""
