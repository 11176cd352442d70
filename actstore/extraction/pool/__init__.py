"""A pool of workers: who computes which unit, and what happens when a worker fails, hangs or is late.

`Pool` decides; a `Fleet` starts workers and passes calls on to them. There are fleets of processes on this machine
and, in ``actstore_workers``, of Ray actors. To add one, write a `Fleet`, and an executor that runs a `Pool` on it.
"""
