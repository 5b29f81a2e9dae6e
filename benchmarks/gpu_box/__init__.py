"""`make bench-gpu`: proofs and measurements at full size on a bare GPU host, in the minutes that there are.

    python -m benchmarks.gpu_box.bring          # here: the packages that such a host lacks, into .gpu_box
    python -m benchmarks.gpu_box --minutes 9    # there, in the same checkout; again, for what is missing
    python -m benchmarks.gpu_box --rehearse     # narrow models on a CPU: shows that everything runs, measures nothing

The host has Python 3.12 and the packages of `host.txt`, and no package index. `parts.py` holds what is done, the most
telling first; `ledger.py` the time limit and what was done before; `tasks.py` runs in processes of its own.
"""
