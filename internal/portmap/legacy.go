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

// The old iptables interface, linux/netfilter_ipv4/ip_tables.h and ip6_tables.h. Rules made by iptables-legacy are not seen over netlink.
const (
	iptGetInfo    = 64 // IPT_SO_GET_INFO
	iptGetEntries = 65 // IPT_SO_GET_ENTRIES
	hookInput     = 1  // NF_INET_LOCAL_IN
	hookForward   = 2  // NF_INET_FORWARD

	iptInfoSize    = 84 // struct ipt_getinfo
	iptEntriesHead = 40 // struct ipt_get_entries up to its entries, on 64-bit
	verdictAt      = 32 // struct xt_standard_target's verdict
	verdictDrop    = -1 // -NF_DROP - 1
	verdictAccept  = -2 // -NF_ACCEPT - 1
	ifnameLen      = 16
)

// legacyFamily is one family's form of it.
type legacyFamily struct {
	command, names string
	family, level  int
	// entry is the size of struct ipt_entry; inAt and outAt are where its interfaces stand, targetAt its target_offset.
	entry, inAt, outAt, targetAt int
}

var legacyFamilies = []legacyFamily{
	{command: "iptables", names: "ip_tables_names", family: unix.AF_INET, level: unix.SOL_IP, entry: 112, inAt: 16, outAt: 32, targetAt: 88},
	{command: "ip6tables", names: "ip6_tables_names", family: unix.AF_INET6, level: unix.SOL_IPV6, entry: 168, inAt: 64, outAt: 80, targetAt: 140},
}

// legacyChain is a built-in chain of the filter table; the zero value is that of a host that does not use iptables-legacy.
type legacyChain struct {
	f       legacyFamily
	entries []byte
	first   int // where its rules begin
	policy  int // and where they end
	drops   bool
}

// LegacyForward are families whose iptables-legacy drops by default what is forwarded, by the command that changes that ("iptables-legacy"), with
// the bridges among some for whom Pass's two rules are not there. Packets pass both kinds of iptables, so rules in one don't help in the other.
func LegacyForward(bridges []string) (map[string][]string, error) {
	var out map[string][]string
	for _, f := range legacyFamilies {
		c, err := f.chain(hookForward)
		if err != nil {
			return nil, err
		}
		if !c.drops {
			continue
		}
		if out == nil {
			out = map[string][]string{}
		}
		out[f.command+"-legacy"] = slices.DeleteFunc(slices.Clone(bridges), func(b string) bool { in, out := c.passes(b); return in && out })
	}
	return out, nil
}

// LegacyPassed lists the commands of families that have one of Pass's rules for a bridge, wherever the policy stands.
func LegacyPassed(bridge string) (commands []string, err error) {
	for _, f := range legacyFamilies {
		c, err := f.chain(hookForward)
		if err != nil {
			return nil, err
		}
		if in, out := c.passes(bridge); in || out {
			commands = append(commands, f.command+"-legacy")
		}
	}
	return commands, nil
}

// LegacyRules are the two rules that let a bridge pass, as arguments of iptables behind -A or -D.
func LegacyRules(bridge string) [][]string {
	return [][]string{
		{"FORWARD", "-i", bridge, "-j", "ACCEPT"},
		{"FORWARD", "-o", bridge, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED,DNAT", "-j", "ACCEPT"},
	}
}

// legacyInput says in words what iptables-legacy has against the host's input; empty when nothing.
func legacyInput() (string, error) {
	c, err := legacyFamilies[0].chain(hookInput)
	switch {
	case err != nil:
		return "", err
	case c.drops:
		return "iptables-legacy's chain INPUT drops by default; see iptables-legacy -S INPUT", nil
	case c.first != c.policy:
		return "iptables-legacy's chain INPUT has rules; see iptables-legacy -S INPUT", nil
	}
	return "", nil
}

// chain reads a chain of the filter table.
func (f legacyFamily) chain(hook int) (ch legacyChain, err error) {
	// Asking for a table makes the kernel load it, so ask only where it is in use.
	b, err := os.ReadFile("/proc/thread-self/net/" + f.names)
	if errors.Is(err, fs.ErrNotExist) {
		return ch, nil
	}
	if err != nil {
		return ch, fmt.Errorf("list iptables: %w", err)
	}
	if !slices.Contains(strings.Fields(string(b)), "filter") {
		return ch, nil
	}
	fd, err := unix.Socket(f.family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return ch, fmt.Errorf("open iptables: %w", err)
	}
	defer unix.Close(fd)
	for range 10 {
		if ch, err = f.read(fd, hook); !errors.Is(err, unix.EAGAIN) { // it changed between the two questions
			break
		}
	}
	if err != nil {
		return ch, fmt.Errorf("read the filter table of %s-legacy: %w", f.command, err)
	}
	return ch, nil
}

func (f legacyFamily) read(fd, hook int) (ch legacyChain, err error) {
	info := make([]byte, iptInfoSize)
	copy(info, "filter")
	if err := getsockopt(fd, f.level, iptGetInfo, info); err != nil {
		return ch, err
	}
	u32 := func(b []byte, at int) int { return int(binary.NativeEndian.Uint32(b[at:])) }
	// name[32], valid_hooks, hook_entry[5], underflow[5], num_entries, size: underflow is where a hook's policy stands.
	size := u32(info, 80)
	entries := make([]byte, iptEntriesHead+size)
	copy(entries, "filter")
	binary.NativeEndian.PutUint32(entries[32:], uint32(size))
	if err := getsockopt(fd, f.level, iptGetEntries, entries); err != nil {
		return ch, err
	}
	ch = legacyChain{f: f, entries: entries[iptEntriesHead:], first: u32(info, 32+4+hook*4), policy: u32(info, 32+4+5*4+hook*4)}
	verdict, standard, _, err := f.rule(ch.entries, ch.policy)
	ch.drops = standard && verdict == verdictDrop
	return ch, err
}

// rule reads the rule at an offset: its verdict if its target is a standard one, and where the next one begins.
func (f legacyFamily) rule(entries []byte, at int) (verdict int32, standard bool, next int, err error) {
	if at < 0 || at+f.entry > len(entries) {
		return 0, false, 0, errors.New("a rule out of bounds")
	}
	target := at + int(binary.NativeEndian.Uint16(entries[at+f.targetAt:]))
	size := int(binary.NativeEndian.Uint16(entries[at+f.targetAt+2:]))
	if target < at+f.entry || target+verdictAt+4 > len(entries) || size < f.entry {
		return 0, false, 0, errors.New("a target out of bounds")
	}
	if name := entries[target+2 : target+verdictAt]; bytes.IndexByte(name, 0) != 0 {
		return 0, false, at + size, nil // another target, so no verdict
	}
	return int32(binary.NativeEndian.Uint32(entries[target+verdictAt:])), true, at + size, nil
}

// passes reports which of the two rules a chain has for a bridge: an accept by its way in alone, and one by its way out with a match.
func (c legacyChain) passes(bridge string) (in, out bool) {
	if c.entries == nil {
		return false, false
	}
	for at := c.first; at < c.policy; {
		verdict, standard, next, err := c.f.rule(c.entries, at)
		if err != nil {
			return in, out
		}
		if standard && verdict == verdictAccept {
			plain := int(binary.NativeEndian.Uint16(c.entries[at+c.f.targetAt:])) == c.f.entry
			inward, outward := text(c.entries[at+c.f.inAt:][:ifnameLen]), text(c.entries[at+c.f.outAt:][:ifnameLen])
			in = in || plain && inward == bridge && outward == ""
			out = out || !plain && outward == bridge && inward == ""
		}
		at = next
	}
	return in, out
}

func getsockopt(fd, level, opt int, b []byte) error {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt), uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
