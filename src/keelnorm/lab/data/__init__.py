"""Real data: what is bundled with the reader's Python, and what is in the reader's own folder.

A data set has an identity: its kind alone where it is bundled ("digits"), its kind and a digest of its files where it
is the reader's ("mnist@1f0c…"), so that a stored result is never taken for one of other data. `images`, `table`,
`spoken` and `characters` load one by its identity; `discover` finds out what a folder has.
"""

from __future__ import annotations

from keelnorm.lab.data.corruptions import CORRUPTIONS, corrupted
from keelnorm.lab.data.data_error import DataError
from keelnorm.lab.data.data_folder import discover
from keelnorm.lab.data.data_split import Split
from keelnorm.lab.data.images import digits, images
from keelnorm.lab.data.limits import limits
from keelnorm.lab.data.spoken import Recordings, speakers_of, spoken
from keelnorm.lab.data.tables import table
from keelnorm.lab.data.text import characters

__all__ = [
    "CORRUPTIONS",
    "DataError",
    "Recordings",
    "Split",
    "characters",
    "corrupted",
    "digits",
    "discover",
    "images",
    "limits",
    "speakers_of",
    "spoken",
    "table",
]
