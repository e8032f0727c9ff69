"""Scripts beside the package; a package itself so that bench.py finds `scripts.workloads`."""
