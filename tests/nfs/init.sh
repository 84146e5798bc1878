#!/bin/bash
# The init process of a User-Mode Linux: exports a disk by NFS, mounts it from two network namespaces, as two hosts do, and
# runs tests there. The kernel's command line sets OPTIONS (of the mounts), PROJECT, PYTHON and TESTS (pytest's -k).
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/mnt TMPDIR=/mnt/tmp LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
exec >/dev/console 2>&1
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /mnt
mount -t tmpfs tmpfs /dev/shm 2>/dev/null || { mkdir -p /dev/shm && mount -t tmpfs tmpfs /dev/shm; }
mkdir -p /mnt/tmp /mnt/modules/lib /mnt/export /run/rpc_pipefs
ln -s /usr/lib/uml/modules /mnt/modules/lib/modules
for module in nfs nfsv4 nfsd veth; do modprobe -d /mnt/modules $module; done
mount -t nfsd nfsd /proc/fs/nfsd
mount -t tmpfs tmpfs /var/lib/nfs
mkdir -p /var/lib/nfs/rpc_pipefs /var/lib/nfs/sm /var/lib/nfs/v4recovery; touch /var/lib/nfs/etab /var/lib/nfs/rmtab
mount -t rpc_pipefs rpc_pipefs /var/lib/nfs/rpc_pipefs
ip link set lo up
mke2fs -q -F /dev/ubda && mount -t ext4 /dev/ubda /mnt/export
rpcbind -w
exportfs -o rw,no_root_squash,no_subtree_check,fsid=0,insecure,sync '*:/mnt/export'
rpc.mountd --no-udp
echo 10 >/proc/fs/nfsd/nfsv4leasetime; echo 10 >/proc/fs/nfsd/nfsv4gracetime
rpc.nfsd 8 && echo Y >/proc/fs/nfsd/v4_end_grace
number=0
for host in a b; do
    number=$((number + 1))
    ip netns add $host; ip link add v$host type veth peer name eth0 netns $host
    ip addr add 10.9.$number.1/24 dev v$host; ip link set v$host up
    ip -n $host addr add 10.9.$number.2/24 dev eth0; ip -n $host link set eth0 up
    # The server tells two clients apart by this name.
    ip netns exec $host sh -c "echo $host >/sys/fs/nfs/net/nfs_client/identifier"
    mkdir /mnt/$host
    nsenter --net=/run/netns/$host mount -t nfs4 -o "$OPTIONS" 10.9.$number.1:/ /mnt/$host
done
grep nfs4 /proc/mounts
cd "$PROJECT" || exit
DQM_CLUSTER_FOLDERS=/mnt/a:/mnt/b "$PYTHON" -m pytest -o addopts= -m slow -p no:cacheprovider -p no:xdist \
    --basetemp /mnt/tmp/pytest -s -rf --color=no -k "$TESTS" tests/test_cluster.py
echo "exit status $?"
sync; poweroff -f
