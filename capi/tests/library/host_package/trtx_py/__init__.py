"""Stands in for trtx_py in the tests of the host."""
