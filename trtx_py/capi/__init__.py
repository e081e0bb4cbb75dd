"""libtrtxpy, the C ABI: for programs that are not in Python.

``python -m trtx_py.capi --path`` says where the library is, ``--cflags`` and ``--libs`` what a compiler needs. What is
imported from here by the library itself is private.
"""
