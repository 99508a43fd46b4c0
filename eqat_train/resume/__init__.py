"""What an unfinished run leaves on disk, and how the same command goes on from it.

Everything here is written beside its final name, synced and renamed, so a kill at any moment leaves the old state or
the new one. Each stage keeps what it was started with; other settings, weights or data are refused, with the
difference shown, and weights that changed on disk are noticed by their checksum.
"""
