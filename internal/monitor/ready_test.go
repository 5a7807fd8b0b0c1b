package monitor_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/control"
	"conex/internal/engine"

	apic "github.com/moby/moby/api/types/container"
)

// ownMonitors lists the command lines of this process's monitors.
func ownMonitors(t *testing.T) (list []string) {
	t.Helper()
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range children {
		b, err := os.ReadFile(c)
		if err != nil {
			continue // the thread is gone
		}
		for _, pid := range strings.Fields(string(b)) {
			if line, err := os.ReadFile("/proc/" + pid + "/cmdline"); err == nil && bytes.HasPrefix(line, []byte(control.Name+"\x00")) {
				list = append(list, string(line))
			}
		}
	}
	return list
}

// A monitor is executed before its container is made: when that fails it must go, and when it comes off it must be told apart.
func TestMonitorBeforeContainer(t *testing.T) {
	w := newWorld(t)
	_, err := w.Run(t.Context(), engine.RunRequest{
		CreateRequest: engine.CreateRequest{Pull: "never", Config: &apic.Config{Image: "nosuch"}}, Detach: true,
	})
	if err == nil {
		t.Fatal("an image that is not there ran")
	}
	w.eventually("a monitor that nobody needs is left", func() bool { return len(ownMonitors(t)) == 0 })

	res, err := w.Run(t.Context(), engine.RunRequest{
		CreateRequest: engine.CreateRequest{Config: &apic.Config{Image: "busybox", Cmd: []string{"sleep", "1000"}}}, Detach: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := ownMonitors(t), control.Name+"\x00"+res.ID[:12]+"\x00"; len(got) != 1 || got[0] != want {
		t.Errorf("monitors %q, want %q", got, want)
	}
	// Executed by hand, without a socket, it ends with an error instead of waiting.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Args = []string{control.Name}
	if err := cmd.Run(); err == nil {
		t.Error("a monitor without a request succeeded")
	}
}
