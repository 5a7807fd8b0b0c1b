package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"conex/internal/linux/cgroup"
)

// limitsWorld is a world with the busybox image and no mirror.
func limitsWorld(t *testing.T) *world {
	t.Helper()
	w := bareWorld(t)
	w.netns = newNetns(t)
	tar, err := busyboxTar()
	if err != nil {
		t.Fatal(err)
	}
	w.conex("import", "-c", `CMD ["sh"]`, tar, "busybox")
	return w
}

// TestMonitorLeavesItsStarter: what a service leaves in its cgroups is ended with it, which a container must survive.
func TestMonitorLeavesItsStarter(t *testing.T) {
	w := limitsWorld(t)
	info := cgroup.Probe()
	roots := []string{}
	for _, dir := range info.Mounts {
		roots = append(roots, dir)
	}
	if info.Unified != "" {
		roots = append(roots, info.Unified)
	}
	service := "conex-test-service-" + strconv.Itoa(os.Getpid())
	script := ""
	for _, root := range roots {
		dir := filepath.Join(root, service)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil { // it fails while a process is in it
				t.Error(err)
			}
		})
		if root == info.Mounts["cpuset"] {
			script += "cat " + root + "/cpuset.cpus >" + dir + "/cpuset.cpus\ncat " + root + "/cpuset.mems >" + dir + "/cpuset.mems\n"
		}
		script += "echo $$ >" + dir + "/cgroup.procs\n"
	}
	cmd := exec.Command("sh", "-e", "-c", script+`exec "$@"`, "sh", w.bin, "run", "-d", "--name", "longer", "--network", "none", "busybox", "sleep", "1000")
	cmd.Env = w.env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, root := range roots {
		if b, err := os.ReadFile(filepath.Join(root, service, "cgroup.procs")); err != nil || len(b) > 0 {
			t.Errorf("%s still has processes %q, %v", filepath.Join(root, service), strings.Fields(string(b)), err)
		}
	}
	w.conex("rm", "-f", "longer")
}
