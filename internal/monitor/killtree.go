package monitor

import (
	"bytes"
	"os"
	"strconv"

	"conex/internal/runtime"

	"golang.org/x/sys/unix"
)

// killTree kills a further process of the container and all that came from it: what is below it, and what is in its session, which
// exec makes for it. A process that has left both, as a daemon does, stays.
//
// They are stopped first, parents and children, until no new one is found: nobody can fork away from under the search.
func (r *run) killTree(p runtime.Process) {
	root := p.Pid()
	family := map[int]string{} // pid to start time, which tells it from a later one of that number
	for range 32 {             // a family that grows faster than that is killed as far as it is known
		pids, err := r.ct.Cgroup().Pids()
		if err != nil {
			break // the cgroup is gone, and they with it
		}
		all := make(map[int]procStat, len(pids))
		for _, pid := range pids {
			if st, ok := readStat(pid); ok {
				all[pid] = st
			}
		}
		grown := false
		for pid, st := range all {
			if _, known := family[pid]; known || !descends(all, pid, root) && st.session != root {
				continue
			}
			family[pid] = st.started
			signalExact(pid, st.started, unix.SIGSTOP)
			grown = true
		}
		if !grown {
			break
		}
	}
	for pid, started := range family {
		signalExact(pid, started, unix.SIGKILL)
	}
	_ = p.Signal(unix.SIGKILL) // an error means that it has ended
}

// descends reports whether root is among the ancestors of pid, or pid itself.
func descends(all map[int]procStat, pid, root int) bool {
	for range len(all) + 1 {
		if pid == root {
			return true
		}
		st, ok := all[pid]
		if !ok {
			return false
		}
		pid = st.parent
	}
	return false
}

// signalExact sends sig to the process pid if it is still the one that started then.
func signalExact(pid int, started string, sig unix.Signal) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // gone
	}
	defer unix.Close(fd)
	if st, ok := readStat(pid); ok && st.started == started {
		_ = unix.PidfdSendSignal(fd, sig, nil, 0) // an error means that it has ended
	}
}

// procStat is what /proc/<pid>/stat says about where a process comes from.
type procStat struct {
	parent, session int
	started         string
}

func readStat(pid int) (procStat, bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procStat{}, false
	}
	// The name stands in parentheses and may hold anything, ")" too.
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 20 {
		return procStat{}, false
	}
	var st procStat
	if st.parent, err = strconv.Atoi(string(f[1])); err != nil {
		return procStat{}, false
	}
	if st.session, err = strconv.Atoi(string(f[3])); err != nil {
		return procStat{}, false
	}
	st.started = string(f[19])
	return st, true
}
