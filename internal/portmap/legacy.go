package portmap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The old iptables interface, linux/netfilter_ipv4/ip_tables.h. Rules made by iptables-legacy are not seen over netlink.
const (
	iptGetInfo    = 64 // IPT_SO_GET_INFO
	iptGetEntries = 65 // IPT_SO_GET_ENTRIES
	hookInput     = 1  // NF_INET_LOCAL_IN
	hookForward   = 2  // NF_INET_FORWARD

	iptInfoSize    = 84  // struct ipt_getinfo
	iptEntriesHead = 40  // struct ipt_get_entries up to its entries, on 64-bit
	iptEntrySize   = 112 // struct ipt_entry
	targetOffsetAt = 88  // its target_offset
	verdictAt      = 32  // struct xt_standard_target's verdict
	verdictDrop    = -1  // -NF_DROP - 1
)

// legacyForwardDrops reports whether the filter table of iptables-legacy has the policy DROP on its FORWARD chain.
func legacyForwardDrops() (bool, error) {
	drops, _, err := legacyPolicy(hookForward)
	return drops, err
}

// legacyInput says in words what iptables-legacy has against the host's input; empty when nothing.
func legacyInput() (string, error) {
	drops, rules, err := legacyPolicy(hookInput)
	switch {
	case err != nil:
		return "", err
	case drops:
		return "iptables-legacy's chain INPUT drops by default; see iptables-legacy -S INPUT", nil
	case rules:
		return "iptables-legacy's chain INPUT has rules; see iptables-legacy -S INPUT", nil
	}
	return "", nil
}

// legacyPolicy reports whether a chain of iptables-legacy's filter table drops by default, and whether there are rules in it.
func legacyPolicy(hook int) (drops, rules bool, err error) {
	// Asking for a table makes the kernel load it, so ask only where it is in use.
	b, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if errors.Is(err, fs.ErrNotExist) {
		return false, false, nil
	}
	if err != nil {
		return false, false, fmt.Errorf("list iptables: %w", err)
	}
	if !slices.Contains(strings.Fields(string(b)), "filter") {
		return false, false, nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return false, false, fmt.Errorf("open iptables: %w", err)
	}
	defer unix.Close(fd)
	info := make([]byte, iptInfoSize)
	copy(info, "filter")
	if err := getsockopt(fd, iptGetInfo, info); err != nil {
		return false, false, fmt.Errorf("read iptables filter: %w", err)
	}
	u32 := func(b []byte, at int) int { return int(binary.NativeEndian.Uint32(b[at:])) }
	// name[32], valid_hooks, hook_entry[5], underflow[5], num_entries, size: underflow is where a hook's policy stands.
	policy, size := u32(info, 32+4+5*4+hook*4), u32(info, 80)
	entries := make([]byte, iptEntriesHead+size)
	copy(entries, "filter")
	binary.NativeEndian.PutUint32(entries[32:], uint32(size))
	err = getsockopt(fd, iptGetEntries, entries)
	if errors.Is(err, unix.EAGAIN) {
		return false, false, errors.New("read iptables filter: it changed meanwhile, try again")
	}
	if err != nil {
		return false, false, fmt.Errorf("read iptables filter: %w", err)
	}
	drops, err = policyDrops(entries[iptEntriesHead:], policy)
	return drops, u32(info, 32+4+hook*4) != policy, err
}

// policyDrops reads the verdict of the rule at offset at.
func policyDrops(entries []byte, at int) (bool, error) {
	if at < 0 || at+iptEntrySize > len(entries) {
		return false, errors.New("read iptables filter: policy out of bounds")
	}
	target := at + int(binary.NativeEndian.Uint16(entries[at+targetOffsetAt:]))
	if target+verdictAt+4 > len(entries) {
		return false, errors.New("read iptables filter: target out of bounds")
	}
	if name := entries[target+2 : target+verdictAt]; bytes.IndexByte(name, 0) != 0 {
		return false, nil // no standard target, so no policy
	}
	return int32(binary.NativeEndian.Uint32(entries[target+verdictAt:])) == verdictDrop, nil
}

func getsockopt(fd, opt int, b []byte) error {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IP, uintptr(opt), uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
