"""Freezes the garbage collector of the server that tests fork their ranks from, which imports this last: what is there
by then is never collected, so a rank's collector need not walk through all of torch, nor copy the pages that it shares
with the others."""

import gc

gc.collect()
gc.freeze()
