"""Benchmarks: `python -m bla_inductor bench`.

    cases → providers (torch, inductor, bla, sdpa, peer) → measure → CSV, table, plots

Every time is the median of many runs, of CUDA-graph replays with a cold L2 on a GPU. Results are
compared with fp64 before a time is printed. The yardstick is the copy bandwidth measured in the
same run; the opponent is Inductor on the same naive code.
"""
