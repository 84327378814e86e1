"""Cleaning: the checks before, the methods, and the state machine around them.

- ``guard``        opens a device for itself alone, or says why that must not be
- ``blocks``       zero, discard, signatures and overwrite, through that one descriptor
- ``commands``     reformat and commands, which open the device themselves
- ``directories``  the files of a mounted directory, by descriptors, never across a mount
- ``machine``      one volume from checked to clean, with progress that survives a kill

The first four run in a process of their own: a system call on a failing disk may never return.
"""
