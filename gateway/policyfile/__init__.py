"""The policy's file format: YAML text in, a compiled `Policy` or every error with its place out.

Owns the language as it is written, apart from what evaluates it. Refuses to read files, to import what serves, and to
repeat secrets.
"""

from gateway.policyfile.compile import MOST_PROBLEMS, PolicyErrors, compile_policy
from gateway.policyfile.deployments import LOCAL_MODEL_VARIABLE
from gateway.policyfile.tree import MAX_BYTES, Problem, first_of

__all__ = [
    "LOCAL_MODEL_VARIABLE",
    "MAX_BYTES",
    "MOST_PROBLEMS",
    "PolicyErrors",
    "Problem",
    "compile_policy",
    "first_of",
]
