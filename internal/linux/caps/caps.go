// Package caps owns the names of Linux capabilities: Docker's default set, Docker's rules for --cap-add and --cap-drop,
// and their bits (capabilities(7)).
package caps

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Errors that Resolve and Mask wrap.
var (
	// ErrUnknown says that no Linux has a capability of that name.
	ErrUnknown = errors.New("unknown capability")
	// ErrUnavailable says that this kernel, or the bounding set of this process, lacks a capability that was asked for.
	ErrUnavailable = errors.New("capability is not available on this host")
)

// all is the name that stands for every capability in --cap-add and --cap-drop.
const all = "ALL"

// names holds every capability at the index that is its number, as linux/capability.h numbers them.
var names = [...]string{
	unix.CAP_CHOWN:              "CAP_CHOWN",
	unix.CAP_DAC_OVERRIDE:       "CAP_DAC_OVERRIDE",
	unix.CAP_DAC_READ_SEARCH:    "CAP_DAC_READ_SEARCH",
	unix.CAP_FOWNER:             "CAP_FOWNER",
	unix.CAP_FSETID:             "CAP_FSETID",
	unix.CAP_KILL:               "CAP_KILL",
	unix.CAP_SETGID:             "CAP_SETGID",
	unix.CAP_SETUID:             "CAP_SETUID",
	unix.CAP_SETPCAP:            "CAP_SETPCAP",
	unix.CAP_LINUX_IMMUTABLE:    "CAP_LINUX_IMMUTABLE",
	unix.CAP_NET_BIND_SERVICE:   "CAP_NET_BIND_SERVICE",
	unix.CAP_NET_BROADCAST:      "CAP_NET_BROADCAST",
	unix.CAP_NET_ADMIN:          "CAP_NET_ADMIN",
	unix.CAP_NET_RAW:            "CAP_NET_RAW",
	unix.CAP_IPC_LOCK:           "CAP_IPC_LOCK",
	unix.CAP_IPC_OWNER:          "CAP_IPC_OWNER",
	unix.CAP_SYS_MODULE:         "CAP_SYS_MODULE",
	unix.CAP_SYS_RAWIO:          "CAP_SYS_RAWIO",
	unix.CAP_SYS_CHROOT:         "CAP_SYS_CHROOT",
	unix.CAP_SYS_PTRACE:         "CAP_SYS_PTRACE",
	unix.CAP_SYS_PACCT:          "CAP_SYS_PACCT",
	unix.CAP_SYS_ADMIN:          "CAP_SYS_ADMIN",
	unix.CAP_SYS_BOOT:           "CAP_SYS_BOOT",
	unix.CAP_SYS_NICE:           "CAP_SYS_NICE",
	unix.CAP_SYS_RESOURCE:       "CAP_SYS_RESOURCE",
	unix.CAP_SYS_TIME:           "CAP_SYS_TIME",
	unix.CAP_SYS_TTY_CONFIG:     "CAP_SYS_TTY_CONFIG",
	unix.CAP_MKNOD:              "CAP_MKNOD",
	unix.CAP_LEASE:              "CAP_LEASE",
	unix.CAP_AUDIT_WRITE:        "CAP_AUDIT_WRITE",
	unix.CAP_AUDIT_CONTROL:      "CAP_AUDIT_CONTROL",
	unix.CAP_SETFCAP:            "CAP_SETFCAP",
	unix.CAP_MAC_OVERRIDE:       "CAP_MAC_OVERRIDE",
	unix.CAP_MAC_ADMIN:          "CAP_MAC_ADMIN",
	unix.CAP_SYSLOG:             "CAP_SYSLOG",
	unix.CAP_WAKE_ALARM:         "CAP_WAKE_ALARM",
	unix.CAP_BLOCK_SUSPEND:      "CAP_BLOCK_SUSPEND",
	unix.CAP_AUDIT_READ:         "CAP_AUDIT_READ",
	unix.CAP_PERFMON:            "CAP_PERFMON",
	unix.CAP_BPF:                "CAP_BPF",
	unix.CAP_CHECKPOINT_RESTORE: "CAP_CHECKPOINT_RESTORE",
}

// defaultMask is Docker's default set.
const defaultMask uint64 = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FSETID | 1<<unix.CAP_FOWNER |
	1<<unix.CAP_MKNOD | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_SETGID | 1<<unix.CAP_SETUID | 1<<unix.CAP_SETFCAP |
	1<<unix.CAP_SETPCAP | 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_SYS_CHROOT | 1<<unix.CAP_KILL | 1<<unix.CAP_AUDIT_WRITE

// Default returns Docker's 14 default capabilities in the form CAP_CHOWN, in the order of their numbers.
func Default() []string { return Names(defaultMask) }

// All returns the capabilities that this kernel knows and that the bounding set of this process still holds, which are
// those that a container can be given at all.
func All() []string { return Names(available()) }

// Available returns All as bits.
func Available() uint64 { return available() }

// Known returns the capabilities that the kernel has, ours or not, as bits.
func Known() uint64 {
	for c := range 64 {
		if _, _, errno := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0, 0); errno != 0 {
			return 1<<c - 1
		}
	}
	return ^uint64(0)
}

// available is asked of the kernel once: a bounding set only shrinks, and only on request.
var available = sync.OnceValue(func() uint64 {
	var mask uint64
	for c := range len(names) {
		r, _, errno := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0, 0)
		if errno != 0 {
			break // EINVAL: the kernel knows neither this number nor a higher one
		}
		if r == 1 {
			mask |= 1 << c
		}
	}
	return mask
})

// Resolve applies Docker's rules for --cap-add and --cap-drop to base and returns what a container gets, ordered by
// number and without repetitions.
//
// Names may come with or without CAP_ and in any case. "ALL" among add means everything available less drop; otherwise
// "ALL" among drop means add alone; otherwise the result is base less drop plus add, so that add wins for a name in both.
// privileged means everything available, whatever the lists say. What base holds and this host lacks is left out (conex
// runs in restricted machines, too); what the user added and this host lacks is ErrUnavailable; a name that doesn't
// exist is ErrUnknown.
func Resolve(base, add, drop []string, privileged bool) ([]string, error) {
	baseMask, err := Mask(base)
	if err != nil {
		return nil, err
	}
	addMask, addAll, err := parse(add, "Add")
	if err != nil {
		return nil, err
	}
	dropMask, dropAll, err := parse(drop, "Drop")
	if err != nil {
		return nil, err
	}
	if privileged {
		return All(), nil
	}
	if missing := addMask &^ available(); missing != 0 {
		return nil, fmt.Errorf("--cap-add %s: %w", strings.Join(Names(missing), ","), ErrUnavailable)
	}
	switch {
	case addAll:
		return Names(available() &^ dropMask), nil
	case dropAll:
		return Names(addMask), nil
	default:
		return Names(baseMask&available()&^dropMask | addMask), nil
	}
}

// parse turns names into bits; everything reports whether "ALL" was among them.
func parse(list []string, verb string) (mask uint64, everything bool, err error) {
	for _, n := range list {
		c := canonical(n)
		if c == "CAP_"+all {
			everything = true
			continue
		}
		i := slices.Index(names[:], c)
		if i < 0 {
			return 0, false, &unknownError{verb: verb, name: c}
		}
		mask |= 1 << i
	}
	return mask, everything, nil
}

// unknownError has Docker's words, which scripts look for, and is ErrUnknown to errors.Is.
type unknownError struct{ verb, name string }

func (e *unknownError) Error() string {
	if e.verb == "" {
		return fmt.Sprintf("unknown capability: %q", e.name)
	}
	return fmt.Sprintf("invalid Cap%s: unknown capability: %q", e.verb, e.name)
}

func (e *unknownError) Is(target error) bool { return target == ErrUnknown }

// canonical returns a name as CAP_UPPER.
func canonical(name string) string {
	n := strings.ToUpper(strings.TrimSpace(name))
	if !strings.HasPrefix(n, "CAP_") {
		n = "CAP_" + n
	}
	return n
}

// Mask returns the bits of the named capabilities, bit 0 being CAP_CHOWN. A name that doesn't exist is ErrUnknown.
func Mask(list []string) (uint64, error) {
	mask, everything, err := parse(list, "")
	if err != nil {
		return 0, err
	}
	if everything {
		mask |= available()
	}
	return mask, nil
}

// Names is the reverse of Mask. Bits without a name are left out.
func Names(mask uint64) []string {
	out := make([]string, 0, bits.OnesCount64(mask))
	for i, n := range names {
		if mask>>i&1 == 1 {
			out = append(out, n)
		}
	}
	return out
}
