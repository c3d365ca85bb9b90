"""The parts of `benchmarks.bench_agent`."""
