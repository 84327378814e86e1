"""local-volume-provisioner: disks and mounts of a node as volumes, and never one wiped by mistake.

An agent on each node looks at the directories that its configuration names and keeps one
PersistentVolume for each disk or mount in them; volumes that users have let go of are cleaned and
offered again. In reading order, each module imports only those before it (and ``cleaning`` the ones
above it):

- ``settings``     flags and environment of the agent
- ``config``       the ConfigMap of the reference, read strictly: all that is wrong at once
  (``yamltext``, ``config_reader``: YAML without surprises; ``globs``; ``methods`` of cleaning)
- ``names``        names, labels and annotations of volumes; sizes as the reference rounds them
- ``devices``      what sysfs says of a block device: ids, size, parent, partitions, who uses it
- ``mounts``       which file system is mounted at an entry, and its UUID
- ``identity``     which disk or file system it is, in three ranks, and whether two are the same
- ``scan``         what lies in the directories: candidates, noise and problems; changes nothing
- ``duplicates``   of those that lead to the same data, the one that becomes a volume
- ``ledger``       node-local records of what has been offered, used and cleaned; survive everything
- ``node``         its labels, its cluster, its taint
- ``volumes``      the PersistentVolume of a candidate; create, adopt, grow, delete
- ``records``      what is written down when, and what a record may be trusted for
- ``states``       the state of each entry as people see it
- ``decide``       what is to be done about an entry, a pure function of the above
- ``whereabouts``  volumes that the watch does not show: gone, or only out of sight
- ``requests``     what ``local-volume clean | offer | retire`` ask of the agent
- ``cleaning``     the checks before a wipe, the methods, and the state machine around them
- ``board``        tells of all states: events on change, /volumes; ``local_metrics``
- ``brake``        on mass release
- ``views``        from all of that to one view of each path
- ``offers``       volumes for what has none
- ``reconcile``    one pass over everything; ``work`` one path, from a worker thread
- ``watcher``      wakes the agent when a directory or the table of mounts changes
- ``reload``       the configuration in force; a bad new one changes nothing
- ``provisioner``  all of it in one loop; ``cli`` what admins type
"""
