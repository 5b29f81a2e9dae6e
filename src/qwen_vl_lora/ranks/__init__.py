"""Several processes, on one machine or more, that share one piece of work: how they are started, watched and ended.

Knows nothing of models or pictures: a work is a function that takes plain data and gives plain data.
"""
