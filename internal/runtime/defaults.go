package runtime

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"conex/internal/linux/caps"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// DefaultPath is $PATH of a container whose image sets none, as Docker has it.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// DefaultSpec returns Docker's defaults for a container: mounts, namespaces, masked and read-only paths, devices and
// capabilities. Process.Args, Env and Cwd, Hostname and CgroupsPath are the caller's.
func DefaultSpec() *specs.Spec {
	c := caps.Default()
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{},
		Process: &specs.Process{
			Cwd:          "/",
			Capabilities: &specs.LinuxCapabilities{Bounding: c, Permitted: c, Effective: c},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.CgroupNamespace},
			},
			MaskedPaths:   MaskedPaths(),
			ReadonlyPaths: ReadonlyPaths(),
			Resources:     &specs.LinuxResources{Devices: deviceRules()},
			// Docker's network sysctls: a container's root may bind low ports and ping without a capability.
			Sysctl: map[string]string{
				"net.ipv4.ip_unprivileged_port_start": "0",
				"net.ipv4.ping_group_range":           "0 2147483647",
			},
		},
	}
}

// MaskedPaths are what a container does not see: what the kernel shows there is either about the whole host or lets its reader act on it.
func MaskedPaths() []string {
	paths := []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	// Machines of metal count there how often each processor was too hot, which tells what others compute.
	for cpu := 0; ; cpu++ {
		p := "/sys/devices/system/cpu/cpu" + strconv.Itoa(cpu) + "/thermal_throttle"
		if unix.Access(p, unix.F_OK) != nil {
			return paths
		}
		paths = append(paths, p)
	}
}

// ReadonlyPaths are what a container sees and can't change.
func ReadonlyPaths() []string {
	return []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
}

// device is one node of a container's /dev.
type device struct {
	path         string
	major, minor int64
}

// standardDevices are the nodes that every container has (runtime-spec, "Default Devices").
var standardDevices = []device{
	{"/dev/null", 1, 3}, {"/dev/zero", 1, 5}, {"/dev/full", 1, 7},
	{"/dev/random", 1, 8}, {"/dev/urandom", 1, 9}, {"/dev/tty", 5, 0},
}

// deviceRules allow the standard devices and terminals, and making nodes of any kind (opening them stays forbidden).
func deviceRules() []specs.LinuxDeviceCgroup {
	n := func(v int64) *int64 { return &v }
	rules := []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Access: "m"},
		{Allow: true, Type: "b", Access: "m"},
	}
	for _, d := range standardDevices {
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: n(d.major), Minor: n(d.minor), Access: "rwm"})
	}
	return append(rules,
		specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: n(5), Minor: n(1), Access: "rwm"}, // /dev/console
		specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: n(5), Minor: n(2), Access: "rwm"}, // /dev/ptmx
		specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: n(136), Access: "rwm"},            // /dev/pts/*
	)
}

// Privileged turns s into what docker run --privileged gives: every capability and device, nothing masked, writable /sys.
func Privileged(s *specs.Spec) error {
	c := caps.All()
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: c, Permitted: c, Effective: c, Inheritable: c}
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths, s.Linux.Seccomp = nil, nil, nil
	for i, m := range s.Mounts {
		if m.Type == "sysfs" || m.Type == "cgroup" {
			s.Mounts[i].Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" })
		}
	}
	s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	devs, err := hostDevices()
	if err != nil {
		return err
	}
	s.Linux.Devices = append(s.Linux.Devices, devs...)
	return nil
}

// hostDevices lists the host's device nodes below /dev, without the folders that a container has of its own.
func hostDevices() ([]specs.LinuxDevice, error) {
	var out []specs.LinuxDevice
	skip := map[string]bool{"/dev/pts": true, "/dev/shm": true, "/dev/mqueue": true, "/dev/fd": true, "/dev/console": true, "/dev/ptmx": true}
	for _, d := range standardDevices {
		skip[d.path] = true
	}
	var walk func(dir string) error
	walk = func(dir string) error {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			if skip[path] {
				continue
			}
			if e.IsDir() {
				if err := walk(path); err != nil {
					return err
				}
				continue
			}
			if e.Type()&os.ModeDevice == 0 {
				continue
			}
			d, err := DeviceFromPath(path)
			if err != nil {
				continue // gone meanwhile
			}
			out = append(out, d)
		}
		return nil
	}
	return out, walk("/dev")
}

// DeviceFromPath describes the host's device node at path.
func DeviceFromPath(path string) (specs.LinuxDevice, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return specs.LinuxDevice{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	d := specs.LinuxDevice{Path: path, Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)), UID: &st.Uid, GID: &st.Gid}
	mode := os.FileMode(st.Mode & 0o777)
	d.FileMode = &mode
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		d.Type = "c"
	case unix.S_IFBLK:
		d.Type = "b"
	default:
		return d, errNoDevice
	}
	return d, nil
}
