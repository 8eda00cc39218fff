"""Imported last by the server that tests fork their ranks from: what is there by then is never collected, so a rank's
garbage collector need not walk through all of torch, nor copy the pages that it shares with the others."""

import gc

gc.collect()
gc.freeze()
