package runtime_test

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"conex/internal/linux/cgroup"
	"conex/internal/runtime"

	"golang.org/x/sys/unix"
)

// stranger returns a process that is not a child of this one.
func stranger(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("sh", "-c", "sleep 1000 & echo $!; wait")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Kill(-cmd.Process.Pid, unix.SIGKILL); err != nil {
			t.Error("the process that was none of the container's: ", err)
		}
		_ = cmd.Wait() // killed
	})
	pid, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(pid)
}

// TestBadRuntimes holds External against runtimes that do not do what they should: one line says so, and nothing of the container is left,
// whatever the runtime itself removes.
func TestBadRuntimes(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	root := rootFolder(t)
	pidFile := `while [ $# -gt 0 ]; do case $1 in --pid-file) echo "$PID" >"$2";; esac; shift; done`
	for name, tc := range map[string]struct{ script, want string }{
		"no process":      {"exit 0", "create succeeded without a process"},
		"rubbish":         {"head -c 3000 /dev/urandom; exit 3", "create: exit status 3"},
		"no number":       {"PID=many; " + pidFile, "process id: "},
		"another process": {"PID=" + stranger(t) + "; " + pidFile, "it is not one that the runtime has left to its caller"},
		"a dead process":  {"PID=4194303; " + pidFile, "process 4194303: "},
		"hangs":           {"trap '' TERM; sleep 1000; exit 1", "create: no end after 1s, it was killed"},
		"an odd message": {`while [ $# -gt 0 ]; do case $1 in --log) printf '{"level":"error","msg":"a\\u001b[31m\\nb"}\n' >"$2";; esac; shift; done; exit 1`,
			"create: a\ufffd[31m b"},
	} {
		t.Run(name, func(t *testing.T) {
			path, state := filepath.Join(t.TempDir(), "bad"), t.TempDir()
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+tc.script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			rt := runtime.NewExternal(path, state).(runtime.External)
			if name == "hangs" { // the others have the time that a busy machine takes
				rt.Limit = time.Second
			}
			c := suite{t, rt, root}.config("sleep", "1000")
			_, err := rt.Create(context.Background(), c)
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Errorf("got %q, want a line with %q", err, tc.want)
			}
			nothingLeft(t, state, c)
		})
	}
}

// TestRuntimeThatDoesNotDelete is about what a runtime leaves of a container that ran.
func TestRuntimeThatDoesNotDelete(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	runc := installed(t, "runc")
	root := rootFolder(t)
	for name, script := range map[string]string{"fails": "exit 1", "hangs": "sleep 1000; exit 1"} {
		for _, started := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				path, state := filepath.Join(t.TempDir(), "bad"), t.TempDir()
				if err := os.WriteFile(path, []byte("#!/bin/sh\ncase \" $* \" in *' delete '*) "+script+";; esac\nexec "+runc+" \"$@\"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
				rt := runtime.NewExternal(path, state).(runtime.External)
				rt.Limit = 5 * time.Second
				c := suite{t, rt, root}.config("sleep", "1000")
				ct, err := rt.Create(context.Background(), c)
				if err != nil {
					t.Fatal(err)
				}
				if started {
					if _, err := ct.Start(context.Background()); err != nil {
						t.Fatal(err)
					}
				}
				if err := ct.Delete(); err != nil {
					t.Error(err)
				}
				nothingLeft(t, state, c)
			})
		}
	}
}

// nothingLeft looks for what a container of an external runtime could leave.
func nothingLeft(t *testing.T, state string, c *runtime.Config) {
	t.Helper()
	for _, d := range []string{"bundles", "runtime"} {
		entries, err := os.ReadDir(filepath.Join(state, d))
		if err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
		if slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() == c.ID }) {
			t.Errorf("left in %s: %s", d, c.ID)
		}
	}
	place, err := cgroup.Parse(c.Spec.Linux.CgroupsPath, false)
	if err != nil {
		t.Fatal(err)
	}
	cg, err := cgroup.Open(place)
	if err != nil {
		t.Fatal(err)
	}
	if pids, err := cg.Pids(); err != nil || len(pids) > 0 {
		t.Errorf("left in the cgroup: %v, %v", pids, err)
	}
	found, err := filepath.Glob("/sys/fs/cgroup/*/conex-test/" + c.ID)
	if err != nil || len(found) > 0 {
		t.Errorf("left: %v, %v", found, err)
	}
}
