package test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"conex/internal/control"
)

// leaks lists what of this world the kernel and the disk still hold, once its containers and images are removed. What is
// taken down off the critical path gets time to go.
func (w *world) leaks() []string {
	var left []string
	for deadline := time.Now().Add(giveUp); ; time.Sleep(50 * time.Millisecond) {
		left = slices.Concat(w.processes(), w.mounts(), w.network(), w.cgroups(), w.files())
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
	}
}

// processes lists those that were started with this world's state folder, name it, or hold a file of it open.
func (w *world) processes() []string {
	var left []string
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, err := os.ReadFile(p + "/cmdline")
		if err != nil || len(cmdline) == 0 {
			continue // gone, or nearly
		}
		environ, _ := os.ReadFile(p + "/environ")
		if bytes.Contains(environ, []byte("CONEX_STATE="+w.state)) || bytes.Contains(cmdline, []byte(w.state)) ||
			bytes.Contains(cmdline, []byte(w.root)) || holdsFile(pid, w.state) || holdsFile(pid, w.root) {
			left = append(left, fmt.Sprintf("process %d: %s", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		}
	}
	return left
}

// monitors lists the process ids of this world's monitors.
func (w *world) monitors() []int {
	var pids []int
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		cmdline, err := os.ReadFile(p + "/cmdline")
		if err != nil || !bytes.HasPrefix(cmdline, []byte(control.Name+"\x00")) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(p)); err == nil && holdsFile(pid, w.state) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// holdsFile says whether the process has a file below dir open.
func holdsFile(pid int, dir string) bool {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	return slices.ContainsFunc(fds, func(fd string) bool {
		target, err := os.Readlink(fd)
		return err == nil && strings.HasPrefix(target, dir+"/")
	})
}

// mounts lists those below the world's folders, in this mount namespace.
func (w *world) mounts() []string {
	var left []string
	for _, m := range mountsBelow(w.state) {
		left = append(left, "mount "+m)
	}
	for _, m := range mountsBelow(w.root) {
		left = append(left, "mount "+m)
	}
	return left
}

func mountsBelow(dir string) []string {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	var found []string
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	return found
}

// unmountBelow detaches what a failed test left, so that its folder can be deleted.
func unmountBelow(t *testing.T, dir string) {
	found := mountsBelow(dir)
	slices.Reverse(found)
	for _, m := range found {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", m, err)
		}
	}
}

// network lists links and nftables tables in the world's own namespace, which had only lo. In the machine's namespace other
// tests work at the same time, so that nothing can be said there.
func (w *world) network() []string {
	if w.netns == nil {
		return nil
	}
	var left []string
	w.inNetns(func() {
		links, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			left = append(left, err.Error())
		}
		for line := range strings.Lines(string(links)) {
			name, _, ok := strings.Cut(strings.TrimSpace(line), ":")
			if ok && name != "lo" {
				left = append(left, "link "+name)
			}
		}
		out, err := exec.Command("nft", "list", "tables").Output()
		if err != nil {
			left = append(left, "nft list tables: "+err.Error())
		}
		for line := range strings.Lines(string(out)) {
			left = append(left, "nft "+strings.TrimSpace(line))
		}
	})
	return left
}

// cgroups lists those that are named after one of the containers that this world has seen.
func (w *world) cgroups() []string {
	var left []string
	for _, pattern := range []string{"/sys/fs/cgroup/conex*/*", "/sys/fs/cgroup/*/conex*/*", "/sys/fs/cgroup/*/*/conex*/*"} {
		dirs, _ := filepath.Glob(pattern)
		for _, d := range dirs {
			if st, err := os.Stat(d); err != nil || !st.IsDir() {
				continue
			}
			w.mu.Lock()
			ours := slices.Contains(w.ids, filepath.Base(d))
			w.mu.Unlock()
			if ours {
				left = append(left, "cgroup "+d)
			}
		}
	}
	return left
}

// files lists what should be empty once everything is removed.
func (w *world) files() []string {
	var left []string
	for _, d := range []string{"containers", "names", "staging", "trash", "leases"} {
		entries, err := os.ReadDir(filepath.Join(w.root, d))
		if err != nil {
			continue // never made
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".lock") || e.Name() == "lock" {
				continue // lock files are permanent
			}
			left = append(left, "file "+filepath.Join(d, e.Name()))
		}
	}
	entries, _ := os.ReadDir(filepath.Join(w.state, "c"))
	for _, e := range entries {
		left = append(left, "state c/"+e.Name())
	}
	return left
}
