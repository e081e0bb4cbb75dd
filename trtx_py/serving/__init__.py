"""Serving: dynamic batching, several devices, ensembles. The public names are re-exported by ``trtx_py``."""
