"""Context parallelism on real ranks: checks, then times. See :mod:`benchmarks.context_parallel`."""
