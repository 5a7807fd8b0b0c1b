package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// runtimeMeasurements are the OCI runtimes alone: conex-runtime in conex's column, runc in Docker's, crun in Podman's, each on a bundle
// of its own with /bin/true.
func runtimeMeasurements() []measurement {
	return []measurement{
		{name: "oci-run", target: 12, once: func(b *bench, e *engine, i int) (float64, error) {
			wall, _, err := runBundle(b, e, i)
			return wall, err
		}},
		{name: "oci-run-cpu", target: 6, once: func(b *bench, e *engine, i int) (float64, error) {
			_, cpu, err := runBundle(b, e, i)
			return cpu, err
		}},
	}
}

// runBundle runs the bundle once and returns what it took, in milliseconds.
func runBundle(b *bench, e *engine, i int) (wall, cpu float64, err error) {
	dir := filepath.Join(e.dir, "bundle")
	program := filepath.Join(dir, "conex-runtime")
	switch e.name {
	case "docker", "podman":
		program = map[string]string{"docker": "runc", "podman": "crun"}[e.name]
		if program, err = exec.LookPath(program); err != nil {
			return 0, 0, err
		}
	}
	if i == 0 {
		if err := makeBundle(e, dir); err != nil {
			return 0, 0, err
		}
	}
	cmd := exec.Command(program, "--root", filepath.Join(e.run, "bundles"), "run", "--bundle", dir, "bench-"+strconv.Itoa(i))
	if _, err := os.Stat("/sys/fs/cgroup/unified"); err == nil && e.name == "podman" {
		// Of crun there are versions that refuse v1 and v2 beside each other: hide the latter. The shell's part is taken off below.
		cmd = exec.Command("unshare", append([]string{"-m", "sh", "-c", `umount /sys/fs/cgroup/unified; exec "$@"`, "crun"}, cmd.Args...)...)
		empty := exec.Command("unshare", "-m", "sh", "-c", `umount /sys/fs/cgroup/unified; exec "$@"`, "crun", "/bin/true")
		began := time.Now()
		if err := empty.Run(); err != nil {
			return 0, 0, err
		}
		wall, cpu = -ms(time.Since(began)), -ms(empty.ProcessState.UserTime()+empty.ProcessState.SystemTime())
	}
	cmd.Dir, cmd.Env = e.dir, e.env
	began := time.Now()
	out, err := cmd.CombinedOutput()
	wall += ms(time.Since(began))
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return wall, cpu + ms(cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()), nil
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }

// makeBundle makes a folder with a busybox and the configuration that runc writes as its example, without a terminal.
func makeBundle(e *engine, dir string) error {
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "rootfs/bin"), 0o755); err != nil {
		return err
	}
	caps := []string{"CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"}
	var namespaces []specs.LinuxNamespace
	for _, t := range []string{"pid", "network", "ipc", "uts", "mount"} {
		namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(t)})
	}
	plain := []string{"nosuid", "noexec", "nodev"}
	spec, err := json.Marshal(specs.Spec{
		Version: "1.0.2", Hostname: "bench", Root: &specs.Root{Path: "rootfs", Readonly: true},
		Process: &specs.Process{
			Args: []string{"/bin/true"}, Env: []string{"PATH=/bin"}, Cwd: "/", NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: append([]string{"mode=1777", "size=65536k"}, plain...)},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: plain},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: append([]string{"ro"}, plain...)},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: append([]string{"relatime", "ro"}, plain...)},
		},
		Linux: &specs.Linux{
			Resources:  &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}}},
			Namespaces: namespaces, CgroupsPath: "/conex-bench-" + e.name,
			MaskedPaths: []string{
				"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
				"/proc/sched_debug", "/sys/firmware", "/proc/scsi",
			},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	})
	if err != nil {
		return err
	}
	link := os.Remove(filepath.Join(dir, "conex-runtime"))
	if link == nil || errors.Is(link, os.ErrNotExist) {
		own := filepath.Join(filepath.Dir(e.argv[0]), "conex-runtime") // the small binary, where it lies beside
		if _, err := os.Stat(own); err != nil {
			own = e.argv[0]
		}
		if own, link = filepath.Abs(own); link == nil {
			link = os.Symlink(own, filepath.Join(dir, "conex-runtime"))
		}
	}
	err = os.Symlink("busybox", filepath.Join(dir, "rootfs/bin/true"))
	if errors.Is(err, os.ErrExist) {
		err = nil
	}
	return errors.Join(link, err, os.WriteFile(filepath.Join(dir, "rootfs/bin/busybox"), bin, 0o755), os.WriteFile(filepath.Join(dir, "config.json"), spec, 0o644))
}
