package test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// suiteLeaks lists what all the tests together have left on this machine: processes that use the suite's folder, monitors of its
// installations, mounts and network namespaces below it. Each world checks itself more closely; this catches what a world that
// failed early, or a test without one, has forgotten.
func suiteLeaks(base string) []string {
	var left []string
	for deadline := time.Now().Add(giveUp); ; time.Sleep(50 * time.Millisecond) {
		left = append(leakedProcesses(base), leakedMounts(base)...)
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
	}
}

func leakedProcesses(base string) []string {
	var left []string
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return []string{err.Error()}
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, err := os.ReadFile(p + "/cmdline")
		if err != nil || len(cmdline) == 0 {
			continue // gone, or nearly
		}
		exe, _ := os.Readlink(p + "/exe") //nolint:errcheck // gone: no path begins with base then

		if strings.HasPrefix(exe, base+"/") || bytes.Contains(cmdline, []byte(base+"/")) || holdsFile(pid, base) {
			left = append(left, fmt.Sprintf("process %d: %s", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		}
	}
	return left
}

func leakedMounts(base string) []string {
	var left []string
	for _, m := range mountsBelow(base) {
		left = append(left, "mount "+m)
	}
	return left
}
