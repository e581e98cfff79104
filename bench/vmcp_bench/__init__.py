"""The benchmark's modules; bench/report.py is the program, docs/benchmarking.md explains every figure."""
