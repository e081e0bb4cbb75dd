"""trtx_py with other packages. Each module needs an optional extra, and says which."""
