#!/bin/bash
# What cleaning scripts written for sig-storage-local-static-provisioner source: its functions by
# name. The device in LOCAL_PV_BLKDEVICE has been checked before a script is started.

errorExit() {
  echo "$*"
  exit 1
}

validateBlockDevice() {
  [[ -n ${LOCAL_PV_BLKDEVICE:-} ]] || errorExit "LOCAL_PV_BLKDEVICE is not set"
  [[ -b $LOCAL_PV_BLKDEVICE ]] || errorExit "$LOCAL_PV_BLKDEVICE is no block device"
}
