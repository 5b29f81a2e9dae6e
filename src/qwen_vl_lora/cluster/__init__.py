"""Several processes that share the work of a run: on this machine, or in a Ray cluster that is already there.

`Processes.on_ranks` runs one function in all of them at once, as training needs it; `Processes.in_pieces` hands out
independent pieces, which are repeated if a process dies. No other package knows that there are several processes.
"""
