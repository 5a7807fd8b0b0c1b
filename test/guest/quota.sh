#!/bin/sh
# --storage-opt size= on a file system with project quotas: quota.sh FS, whose file system is mounted at /quota/FS. The limit is shown by
# what a container can write, not by what was set.
fs=$1
export CONEX_ROOT=/quota/$fs/conex CONEX_STATE=/run/conex-quota-$fs CONEX_CONFIG=/none PATH=/bin:/sbin
fail() {
	echo "guest: quota on $fs: $*"
	exit 1
}
# is WHAT WANT GOT
is() { [ "$2" = "$3" ] || fail "$1: got '$3', want '$2'"; }
# full WHAT TEXT: TEXT says that there was no room (ext4 has a word of its own for a quota).
full() { case "$2" in *"No space left"* | *"uota exceeded"*) ;; *) fail "$1: got '$2', want that there is no room" ;; esac; }
# about WHAT KIB GOT: GOT is KIB, but for a tenth that is the file system's own.
about() { [ "$3" -le "$2" ] && [ "$3" -ge $(($2 * 9 / 10)) ] || fail "$1: got $3 KiB, want nearly $2"; }
# fill CONTAINER MIB [OPTION]: writes so much to /f and says how it went.
fill() { conex exec $3 "$1" sh -c "dd if=/dev/zero of=/f bs=1M count=$2 2>&1 && echo fits"; }

(cd /tmp/image && ln -sf busybox bin/dd && ln -sf busybox bin/df && ln -sf busybox bin/du && ln -sf busybox bin/rm && tar -c .) | conex import --progress quiet - busybox >/dev/null || fail import
conex run -d --name aa --network none --storage-opt size=20m -v vol:/vol busybox sleep 1000 >/dev/null || fail run
is inspect 20m "$(conex inspect -f '{{.HostConfig.StorageOpt.size}}' aa)"
is "size that df says" 20480 "$(conex exec aa df -k / | awk 'NR == 2 { print $2 }')"
full "40 MB in 20" "$(fill aa 40)"
about "what was written" 20480 "$(conex exec aa du -sk /f | cut -f1)"
full "one byte more" "$(conex exec aa sh -c 'dd if=/dev/zero of=/g bs=1M count=1 2>&1')"
full "a privileged exec" "$(fill aa 40 --privileged)"
full "with the right to pass quotas" "$(conex run --rm --network none --cap-add SYS_RESOURCE --storage-opt size=20m busybox sh -c 'dd if=/dev/zero of=/f bs=1M count=40 2>&1')"
# Nobody else is bounded: volumes, other containers, the host.
is "a volume" fits "$(conex exec aa sh -c 'dd if=/dev/zero of=/vol/f bs=1M count=40 2>/dev/null && echo fits')"
is "another container" fits "$(conex run --rm --network none busybox sh -c 'dd if=/dev/zero of=/f bs=1M count=40 2>/dev/null && echo fits')"
is "the host" fits "$(dd if=/dev/zero of=/quota/$fs/f bs=1M count=40 2>/dev/null && echo fits)"
conex run -d --name bb --network none --storage-opt size=10m busybox sleep 1000 >/dev/null || fail "a second one"
is "in the second one" fits "$(fill bb 9 | tail -n 1)"
full "above the second one's" "$(fill bb 11)"
# What is removed is free again, and the limit outlives the run.
conex exec aa rm -f /f /g || fail "rm in a full container"
is "after the removal" fits "$(fill aa 15 | tail -n 1)"
conex restart -t 0 aa >/dev/null || fail restart
full "after a restart" "$(conex exec aa sh -c 'dd if=/dev/zero of=/g bs=1M count=10 2>&1')"
conex commit aa full >/dev/null || fail commit
is "what was committed" 15360 "$(conex run --rm --network none full du -sk /f | cut -f1)"
conex rm -f aa bb >/dev/null || fail rm
# The number of who is gone can be had again, with all of its room.
conex run -d --name cc --network none --storage-opt size=30m busybox sleep 1000 >/dev/null || fail "run again"
is "in a new one" fits "$(fill cc 25 | tail -n 1)"
full "above the new one's" "$(fill cc 31)"
conex rm -f cc >/dev/null
conex system teardown || fail teardown
rm -r /quota/$fs/f $CONEX_ROOT
echo "guest: quota on $fs: everything as it should be"
