"""What runs in a worker process: nothing here imports trtx_py, which the interpreter that runs it may not have."""
