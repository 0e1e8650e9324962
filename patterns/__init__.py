"""The families that are recognised, one a file, declared in index notation and matched against
Terms.
"""

from bla_inductor.patterns.linear_attention import FAMILY, LinearAttention, Mismatch, match

__all__ = ["FAMILY", "LinearAttention", "Mismatch", "match"]
