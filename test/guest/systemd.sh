#!/bin/sh
# The last part: systemd is process 1. Services start it, one after the other; see run.
export PATH=/bin:/sbin
case $1 in
starter) # a service that starts a container and ends
	export CONEX_ROOT=/tmp/conex-starter CONEX_STATE=/run/conex-starter CONEX_CONFIG=/none
	(cd /tmp/image && tar -c .) | conex import --progress quiet - busybox >/dev/null && conex run -d --name longer --network none busybox sleep 1000 >/dev/null ||
		echo "guest: the starter failed"
	;;
check)
	result=ok
	export CONEX_ROOT=/tmp/conex-starter CONEX_STATE=/run/conex-starter CONEX_CONFIG=/none
	if [ "$(conex inspect -f '{{.State.Status}}' longer)" = running ] && conex exec longer true; then
		echo "guest: a container outlives the service that started it"
	else
		echo "guest: the container died with the service that started it"
		result=failed
	fi
	conex rm -f longer >/dev/null
	cd /tests/internal_linux_cgroup && ./test -test.run 'TestSystemd|TestPlaces' -test.v -test.timeout 5m || result=failed
	sh /conex.sh systemd || result=failed
	echo "guest: systemd $(cat /systemd-version): result $result"
	[ $result = ok ] && [ -e /tmp/conex-guest-ok ] && echo "guest: result ok" || echo "guest: result failed"
	poweroff -f
	;;
esac
