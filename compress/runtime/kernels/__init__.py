"""Linears in the fastest form that this machine has, chosen by measurement: `svlm.load(OUT, runtime="torch")`."""
