"""Scanning: reading every row of a store once, in order, and keeping only what reductions make of them.

A store is scanned in units, and a unit in blocks, both cut from the shape of the store alone. Each unit is reduced by
itself, in one thread, and units are merged in order. So the result has the same bits whatever the number of workers
and interruptions.
"""
