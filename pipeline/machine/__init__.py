"""The machine: device and threads, forks of this process, the processes of a training run, dask clusters.

May import `core`.
"""
