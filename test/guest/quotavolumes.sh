#!/bin/sh
# Volumes with a size on a file system with project quotas: quotavolumes.sh FS, as quota.sh.
fs=$1
export CONEX_ROOT=/quota/$fs/volumes CONEX_STATE=/run/conex-quotavolumes-$fs CONEX_CONFIG=/none PATH=/bin:/sbin
fail() {
	echo "guest: volumes on $fs: $*"
	exit 1
}
is() { [ "$2" = "$3" ] || fail "$1: got '$3', want '$2'"; }
full() { case "$2" in *"No space left"* | *"uota exceeded"* | *"no space left"* | *"there is no room"*) ;; *) fail "$1: got '$2', want that there is no room" ;; esac; }
# fill VOLUME MIB: writes so much and says how it went.
fill() { conex run --rm --network none -v "$1":/v busybox sh -c "rm -f /v/f; dd if=/dev/urandom of=/v/f bs=1M count=$2 2>&1 && echo fits"; }

(cd /tmp/image && ln -sf busybox bin/dd && ln -sf busybox bin/df && ln -sf busybox bin/rm && tar -c .) | conex import --progress quiet - busybox >/dev/null || fail import
conex volume create -o size=20m aa >/dev/null || fail create
is "what inspect says" 20m "$(conex volume inspect -f '{{.Options.size}}' aa)"
is "size that df says" 20480 "$(conex run --rm --network none -v aa:/v busybox df -k /v | awk 'NR == 2 { print $2 }')"
is "15 MB in 20" fits "$(fill aa 15 | tail -n 1)"
full "40 MB in 20" "$(fill aa 40)"
is "15 MB again" fits "$(fill aa 15 | tail -n 1)"
# A second one has a number of its own, the host none.
conex volume create -o size=10m bb >/dev/null || fail "a second one"
is "9 MB in 10" fits "$(fill bb 9 | tail -n 1)"
full "12 MB in 10" "$(fill bb 12)"
is "one without a size" fits "$(fill cc 40 | tail -n 1)"
# The copy of first use, snapshots, clones, restores and archives of a bounded one.
conex volume snapshot aa s >/dev/null || fail snapshot
is "18 MB beside a snapshot" fits "$(fill aa 18 | tail -n 1)"
conex volume restore --keep before aa@s || fail restore
is "what was restored" 15728640 "$(conex run --rm --network none -v aa:/v busybox stat -c %s /v/f)"
full "40 MB after a restore" "$(fill aa 40)"
conex volume clone aa@s dd >/dev/null || fail clone
full "40 MB in a clone" "$(fill dd 40)"
conex volume export -o /tmp/cc.tar cc || fail export
full "an archive of 40 MB" "$(conex volume import --replace aa /tmp/cc.tar 2>&1)"
is "what an import that failed leaves" yes "$(conex run --rm --network none -v aa:/v busybox sh -c '[ -e /v/f ] && echo yes')"
is "staging" "" "$(ls $CONEX_ROOT/staging)"
conex run --name base --network none busybox sh -c 'mkdir /data && dd if=/dev/zero of=/data/f bs=1M count=5 2>/dev/null' && conex commit base filled >/dev/null && conex rm base >/dev/null || fail image
conex volume create -o size=8m ee >/dev/null && conex volume create -o size=2m ff >/dev/null || fail "create for a first use"
is "the copy of first use" 5242880 "$(conex run --rm --network none -v ee:/data filled stat -c %s /data/f)"
full "a first use that does not fit" "$(conex run --rm --network none -v ff:/data filled true 2>&1)"
is "what it leaves" "" "$(ls $CONEX_ROOT/volumes/ff/_data)"
# An overlay of a container with a bound is bounded with it.
full "an overlay" "$(conex run --rm --network none --storage-opt size=10m -v cc:/v:overlay busybox sh -c 'dd if=/dev/zero of=/v/g bs=1M count=20 2>&1')"
conex volume rm --snapshots aa bb cc dd ee ff >/dev/null || fail rm
conex system teardown || fail teardown
rm -r $CONEX_ROOT /tmp/cc.tar
echo "guest: volumes on $fs: everything as it should be"
