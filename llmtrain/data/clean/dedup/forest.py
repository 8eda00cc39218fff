"""Joins copies to clusters: forests in which every document points to the first document of its tree."""

from __future__ import annotations

import numpy as np

LINK = np.dtype([("place", "<u8"), ("root", "<u8"), ("exact", "u1")])  # a copy, what stays, whether its text is equal


def links(places: np.ndarray, roots: np.ndarray, exact: bool) -> np.ndarray:
    """Returns links from copies to earlier documents."""
    made = np.empty(len(places), LINK)
    made["place"], made["root"], made["exact"] = places, roots, exact
    return made


def joined(edges: np.ndarray) -> np.ndarray:
    """Returns the links from every document, but the roots, to the first one that it is connected with, sorted.

    The result depends on which documents are connected, not on the order or number of the edges. A link is exact where
    an edge from its document was. Every root hooks onto its lowest neighbour, for all documents at once, then paths are
    shortened (Shiloach and Vishkin, 1982): a root that neither hooks nor is hooked to does so in the next round, so two
    rounds at least halve the roots that are not yet done.
    """
    places, ends = np.unique(np.concatenate([edges["place"], edges["root"]]), return_inverse=True)
    a, b = ends[: len(edges)], ends[len(edges) :]
    parent = np.arange(len(places))
    while len(a):
        low, high = np.minimum(parent[a], parent[b]), np.maximum(parent[a], parent[b])
        np.minimum.at(parent, high, low)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
        apart = parent[a] != parent[b]
        a, b = a[apart], b[apart]
    exact = np.zeros(len(places), bool)
    exact[ends[: len(edges)][edges["exact"] == 1]] = True
    copy = parent != np.arange(len(places))
    forest = links(places[copy], places[parent[copy]], False)
    forest["exact"] = exact[copy]
    return forest
