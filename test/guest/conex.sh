#!/bin/sh
# What a user types, in a machine with cgroup v2 alone: conex.sh DRIVER, where DRIVER is that of cgroups, cgroupfs or systemd.
# Everything is compared with the kernel's own files.
driver=$1
export CONEX_ROOT=/tmp/conex-$driver CONEX_STATE=/run/conex-$driver CONEX_CONFIG=/tmp/conex-$driver.toml PATH=/bin:/sbin
echo "cgroup-driver = \"$driver\"" >$CONEX_CONFIG
fail() {
	echo "guest: conex on $driver: $*"
	exit 1
}
# is WHAT WANT GOT
is() { [ "$2" = "$3" ] || fail "$1: got '$3', want '$2'"; }
# says WHAT PART TEXT
says() { case "$3" in *"$2"*) ;; *) fail "$1: got '$3', want '$2' in it" ;; esac; }
folder() {
	id=$(conex inspect -f '{{.Id}}' "$1")
	case $driver in
	systemd) echo "/sys/fs/cgroup/system.slice/conex-$id.scope" ;;
	*) echo "/sys/fs/cgroup/conex/$id" ;;
	esac
}

mkdir -p /tmp/image/bin /tmp/image/tmp /tmp/image/proc
cp /bin/busybox /tmp/image/bin/
for a in sh sleep cat head tr echo nproc mknod grep true touch kill stat; do ln -sf busybox /tmp/image/bin/$a; done
(cd /tmp/image && tar -c .) | conex import --progress quiet - busybox >/dev/null || fail import
is "cgroup version" "2 $driver" "$(conex info -f '{{.CgroupVersion}} {{.CgroupDriver}}')"
is "run" "hello" "$(conex run --rm --network none busybox echo hello)"
is "cgroup namespace" "0::/" "$(conex run --rm --network none busybox cat /proc/self/cgroup)"

conex run -d --name one --network none -m 64m --memory-swap 96m --memory-reservation 32m --cpus 0.5 -c 512 --pids-limit 50 --cpuset-cpus 0 \
	--device-read-bps /dev/vda:1mb --device-write-iops /dev/vda:100 --device-cgroup-rule 'c 99:* r' busybox sleep 1000 >/dev/null || fail "run with limits"
cg=$(folder one)
is memory.max 67108864 "$(cat $cg/memory.max)"
is memory.low 33554432 "$(cat $cg/memory.low)"
[ ! -e $cg/memory.swap.max ] || is memory.swap.max 33554432 "$(cat $cg/memory.swap.max)"
is cpu.max "50000 100000" "$(cat $cg/cpu.max)"
is cpu.weight 59 "$(cat $cg/cpu.weight)"
is pids.max 50 "$(cat $cg/pids.max)"
is cpuset.cpus 0 "$(cat $cg/cpuset.cpus)"
says io.max "rbps=1048576 wbps=max riops=max wiops=100" "$(cat $cg/io.max)"
is "processes" "$(conex inspect -f '{{.State.Pid}}' one)" "$(cat $cg/cgroup.procs)"
is "exec" "up" "$(conex exec one echo up)"
is "exec's cgroup" "0::/" "$(conex exec one cat /proc/self/cgroup)"
is "monitor's cgroup" "0::/conex/monitors" "$(cat /proc/$(pidof conex-monitor)/cgroup)"
# Devices by BPF: what the default list has, what a rule adds, and what neither has.
is "null" "" "$(conex exec one sh -c 'echo x >/dev/null' 2>&1)"
says "a rule's device" "No such device" "$(conex exec one sh -c 'mknod /tmp/d c 99 0; head -c 1 /tmp/d' 2>&1)"
says "reading alone" "not permitted" "$(conex exec one sh -c 'echo x >/tmp/d' 2>&1)"
says "another device" "not permitted" "$(conex exec one sh -c 'mknod /tmp/k c 98 0; head -c 1 /tmp/k' 2>&1)"

is "update" one "$(conex update -m 128m --memory-swap 128m --cpus 0.25 -c 2048 --pids-limit 7 one)"
is memory.max 134217728 "$(cat $cg/memory.max)"
[ ! -e $cg/memory.swap.max ] || is memory.swap.max 0 "$(cat $cg/memory.swap.max)"
is cpu.max "25000 100000" "$(cat $cg/cpu.max)"
is cpu.weight 174 "$(cat $cg/cpu.weight)"
is pids.max 7 "$(cat $cg/pids.max)"
is io.max "254:0 rbps=1048576 wbps=max riops=max wiops=100" "$(cat $cg/io.max)"
says "v1's setting" "Memory swappiness discarded" "$(conex run --rm --network none -m 64m --memory-swappiness 3 busybox true 2>&1)"
says "fork" "fork" "$(conex exec one sh -c 'for i in 1 2 3 4 5 6 7 8; do sleep 5 & done' 2>&1)"

conex pause one >/dev/null || fail pause
says "frozen" "frozen 1" "$(cat $cg/cgroup.events)"
is "stats" "$(cat $cg/pids.current) 0.00%" "$(conex stats --no-stream --format '{{.PIDs}} {{.CPUPerc}}' one)"
used=$(($(cat $cg/memory.current) - $(sed -n 's/^inactive_file //p' $cg/memory.stat)))
is "stats of memory" "$(awk -v n=$used 'BEGIN { if (n >= 1048576) printf "%.4g", n / 1048576; else printf "%.4g", n / 1024 }')" \
	"$(conex stats --no-stream --format '{{.MemUsage}}' one | sed 's/[KM]iB.*//')"
conex unpause one >/dev/null || fail unpause
says "thawed" "frozen 0" "$(cat $cg/cgroup.events)"
is "top" 1 "$(conex top one | grep -c 'sleep 1000')"

conex run --name fat --network none -m 20m --memory-swap 20m busybox sh -c 'x=$(head -c 60m /dev/zero | tr "\0" x); echo not killed'
is "out of memory" 137 $?
is "the record" true "$(conex inspect -f '{{.State.OOMKilled}}' fat)"
says "why" "20MiB" "$(conex why fat)"

conex restart -t 0 one >/dev/null || fail restart
is "memory.max after a restart" 134217728 "$(cat $cg/memory.max)"
conex rm -f one fat >/dev/null || fail rm
[ ! -e $cg ] || fail "$cg is left"
case $driver in
systemd) parent=conexguest-part.slice dir=/sys/fs/cgroup/conexguest.slice/conexguest-part.slice ;;
*) parent=/conexguest/part dir=/sys/fs/cgroup/conexguest/part ;;
esac
id=$(conex run -d --network none --cgroup-parent $parent busybox sleep 1000) || fail "cgroup parent"
is "folders below the parent" 1 "$(ls -d $dir/*$id* | wc -l)"
conex rm -f $id >/dev/null
if [ $driver = systemd ]; then
	says "a parent that is none" "xxx.slice" "$(conex run --rm --cgroup-parent /x busybox true 2>&1)"
fi
# RUN steps of builds are where containers are, with their limits, and go with their builder however that ends.
printf 'FROM busybox\nRUN sleep 1000\n' >/tmp/Dockerfile
step() { # step DIRECTORY [OPTION...]
	at=$1
	shift
	conex build --network none --progress plain "$@" - </tmp/Dockerfile >/tmp/build.log 2>&1 &
	for i in $(seq 100); do
		cg=$(ls -d $at/*build-* 2>/dev/null) && [ -n "$(cat $cg/cgroup.procs)" ] && break
		sleep 0.1
	done
	[ -n "$cg" ] || fail "no cgroup of a step in $at: $(cat /tmp/build.log)"
}
case $driver in
systemd) own=/sys/fs/cgroup/system.slice ;;
*) own=/sys/fs/cgroup/conex ;;
esac
step $own -m 64m
is "a step's memory.max" 67108864 "$(cat $cg/memory.max)"
kill -9 $!
wait $! 2>/dev/null
conex debug busybox true || fail "debug of an image" # which settles builds
[ ! -e $cg ] || fail "$cg is left of a killed build"
step $dir --cgroup-parent $parent
kill $!
wait $! && fail "a build that was ended"
[ ! -e $cg ] || fail "$cg is left"
if [ $driver = systemd ]; then
	says "a parent that is none, of a build" "xxx.slice" "$(conex build --cgroup-parent /x - </tmp/Dockerfile 2>&1)"
fi

# A container with ids of its own, and tools beside it: a tmpfs of this kernel can't be shown with other ids.
conex run -d --name own --network none --userns auto busybox sleep 1000 >/dev/null || fail "run with a user namespace"
is "files and ids there" "0 0" "$(conex exec own sh -c 'touch /f; echo $(stat -c %u /f /bin)')"
is "debug there" "0 0 0" "$(conex debug -c 'touch /t; echo $(stat -c %u /t /bin/busybox /target/f)' own)"
conex rm -f own >/dev/null || fail "rm of it"
conex system teardown || fail teardown
echo "guest: conex on $driver: everything as it should be"
