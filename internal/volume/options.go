package volume

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"conex/internal/linux/mount"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// optionError is ErrOptions in words of its own.
type optionError struct{ text string }

func (e *optionError) Error() string        { return e.text }
func (e *optionError) Is(target error) bool { return target == ErrOptions }

func wrongOption(format string, args ...any) error { return &optionError{fmt.Sprintf(format, args...)} }

// CheckOptions checks options of the local driver, in Docker's words. The error is ErrOptions.
func CheckOptions(opts map[string]string) error {
	for _, o := range slices.Sorted(maps.Keys(opts)) {
		if !slices.Contains([]string{"type", "o", "device", "size"}, o) {
			return wrongOption("invalid option: %q", o)
		}
	}
	for _, need := range [][]string{{"device", "type"}, {"type", "device"}, {"o", "device", "type"}} {
		if _, ok := opts[need[0]]; !ok {
			continue
		}
		for _, n := range need[1:] {
			if opts[n] == "" {
				return wrongOption("missing required option: %q", n)
			}
		}
	}
	if s, ok := opts["size"]; ok {
		if n, err := units.RAMInBytes(s); err != nil || n <= 0 {
			return wrongOption("invalid size: '%s'", s)
		}
	}
	if opts["type"] == "" {
		return nil
	}
	m := parseMount(opts)
	if m.bind && !filepath.IsAbs(opts["device"]) {
		return wrongOption("device %q is no absolute path", opts["device"])
	}
	if opts["size"] != "" && opts["type"] != "tmpfs" {
		return wrongOption("size is for volumes in the data folder and for tmpfs: a %s has the size of its device", opts["type"])
	}
	return nil
}

// Mounted reports whether a file system of its own stands in the place of the volume's content.
func (v *Volume) Mounted() bool { return v.Options["type"] != "" }

// Size is what the content may take by a quota, in bytes, 0 for no bound.
func (v *Volume) Size() (int64, error) {
	s := v.Options["size"]
	if s == "" || v.Mounted() {
		return 0, nil
	}
	n, err := units.RAMInBytes(s)
	if err != nil || n <= 0 {
		return 0, wrongOption("invalid size: '%s'", s)
	}
	return n, nil
}

// mounting is what the options type, o and device ask for.
type mounting struct {
	fstype          string
	bind, recursive bool
	attr            uint64 // MOUNT_ATTR_*
	propagation     uint64
	params          []mount.Param
}

var mountAttrs = map[string]uint64{
	"ro": unix.MOUNT_ATTR_RDONLY, "nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV, "noexec": unix.MOUNT_ATTR_NOEXEC,
	"noatime": unix.MOUNT_ATTR_NOATIME, "strictatime": unix.MOUNT_ATTR_STRICTATIME, "nodiratime": unix.MOUNT_ATTR_NODIRATIME,
}

// parseMount reads the options as mount(8) would.
func parseMount(opts map[string]string) mounting {
	m := mounting{fstype: opts["type"], propagation: unix.MS_PRIVATE}
	for _, o := range strings.Split(opts["o"], ",") {
		if a, ok := mountAttrs[o]; ok {
			m.attr |= a
			continue
		}
		switch o {
		case "bind":
			m.bind = true
		case "rbind":
			m.bind, m.recursive = true, true
		case "shared", "rshared":
			m.propagation = unix.MS_SHARED
		case "slave", "rslave":
			m.propagation = unix.MS_SLAVE
		case "", "defaults", "rw", "suid", "dev", "exec", "atime", "relatime", "diratime", "async", "auto", "noauto", "nofail", "_netdev", "private", "rprivate":
		default:
			k, v, hasValue := strings.Cut(o, "=")
			m.params = append(m.params, mount.Param{Key: k, Value: v, Flag: !hasValue})
		}
	}
	if m.fstype == "bind" {
		m.bind = true
	}
	if s := opts["size"]; s != "" {
		m.params = append(m.params, mount.Param{Key: "size", Value: strings.TrimSuffix(strings.ToLower(s), "b")})
	}
	return m
}

// resolved has an address in the place of the name in addr=, as the kernel wants it of nfs and cifs; a device that names its host is
// enough.
func (m *mounting) resolved(device string) error {
	if !strings.HasPrefix(m.fstype, "nfs") && m.fstype != "cifs" && m.fstype != "smb3" {
		return nil
	}
	host := ""
	at := slices.IndexFunc(m.params, func(p mount.Param) bool { return p.Key == "addr" })
	switch {
	case at >= 0:
		host = m.params[at].Value
	case strings.HasPrefix(m.fstype, "nfs"):
		host, _, _ = strings.Cut(device, ":/")
	default:
		host, _, _ = strings.Cut(strings.TrimLeft(device, "/"), "/")
	}
	host = strings.Trim(host, "[]")
	if host == "" {
		return fmt.Errorf("%s: which host? Say o=addr=HOST", device)
	}
	if _, err := netip.ParseAddr(host); err != nil {
		addrs, err := net.LookupHost(host)
		if err != nil {
			return fmt.Errorf("look for the host of %s: %w", device, err)
		}
		host = addrs[0]
	}
	if at < 0 {
		m.params = append(m.params, mount.Param{Key: "addr", Value: host})
	} else {
		m.params[at].Value = host
	}
	return nil
}
