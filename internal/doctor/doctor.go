// Package doctor looks at a machine, as far as containers need it, and says what is missing and how to mend it.
//
// Every check is a function of its own that reads and changes nothing. What only root can see, a check says that it could not look at.
package doctor

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"conex/internal/config"

	"golang.org/x/sys/unix"
)

// Levels of a result.
const (
	OK       = "ok"
	Degraded = "degraded" // works, with less than could be
	Broken   = "broken"   // containers don't start, or do not what they should
	Unknown  = "unknown"  // could not be looked at
)

// Result is what one check found.
type Result struct {
	// Check is the check's name, a word.
	Check string `json:"check"`
	Level string `json:"level"`
	// Found says in one line how things are, Mend what to do about it.
	Found string `json:"found"`
	Mend  string `json:"mend,omitempty"`
	// Details are for who wants to know all.
	Details []string `json:"details,omitempty"`
}

// Worse makes a result of a level that is not below l; the first words of a level stand, further ones go to the details.
func (r *Result) Worse(l, found, mend string) {
	if rank(l) > rank(r.Level) {
		if r.Level != OK && r.Found != "" {
			r.Note("%s%s", r.Found, hint(r.Mend))
		}
		r.Level, r.Found, r.Mend = l, found, mend
		return
	}
	r.Note("%s%s", found, hint(mend))
}

func hint(mend string) string {
	if mend == "" {
		return ""
	}
	return " (" + mend + ")"
}

// Note adds a detail.
func (r *Result) Note(format string, args ...any) {
	r.Details = append(r.Details, fmt.Sprintf(format, args...))
}

func rank(level string) int {
	switch level {
	case Broken:
		return 3
	case Degraded:
		return 2
	case Unknown:
		return 1
	}
	return 0
}

// Host is the machine, and the installation on it.
type Host struct {
	Config *config.Config
	// ResolvConf is the host's resolver configuration; Nameserver the port of name servers, 53 but in tests.
	ResolvConf string
	Nameserver uint16
}

// check is one look at the machine.
type check struct {
	name string
	look func(context.Context, *Host, *Result)
}

// checks are all, in the order of the report.
var checks = []check{
	{"kernel", kernel},
	{"processes", processes},
	{"namespaces", namespaces},
	{"mounts", mounts},
	{"overlay", overlay},
	{"seccomp", seccompFilter},
	{"lsm", lsm},
	{"capabilities", capabilities},
	{"cgroups", cgroups},
	{"limits", limits},
	{"root", rootFolder},
	{"space", space},
	{"quota", quotas},
	{"state", stateFolder},
	{"forwarding", forwarding},
	{"bridge-nf", bridgeFilter},
	{"conntrack", conntrack},
	{"firewall", firewalls},
	{"dns", nameservers},
	{"mtu", mtu},
	{"kernel-limits", kernelLimits},
	{"clock", clock},
	{"programs", programs},
}

// Look runs the checks, several at a time, and returns their results in order. Looking up names may take a second or two; nothing else waits.
func (h *Host) Look(ctx context.Context) []Result {
	out := make([]Result, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		out[i] = Result{Check: c.name, Level: OK}
		if c.name != "dns" { // what waits does so beside the others; those are quicker one after the other
			c.look(ctx, h, &out[i])
			continue
		}
		wg.Go(func() { c.look(ctx, h, &out[i]) })
	}
	wg.Wait()
	return out
}

// text is a small file's content without the white space around it, empty when there is none.
func text(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// number reads a file with one number.
func number(path string) (int64, bool) {
	n, err := strconv.ParseInt(text(path), 10, 64)
	return n, err == nil
}

// sysctl reads a number below /proc/sys.
func sysctl(name string) (int64, bool) {
	return number("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
}

func isRoot() bool { return os.Geteuid() == 0 }

// release is the kernel's version, as uname says it.
func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// version are the first two numbers of a release.
func version(release string) (major, minor int) {
	_, err := fmt.Sscanf(release, "%d.%d", &major, &minor)
	if err != nil {
		return 0, 0
	}
	return major, minor
}

func atLeast(release string, major, minor int) bool {
	a, b := version(release)
	return a > major || a == major && b >= minor
}

// has reports whether the kernel knows a system call: any answer but "no such call".
func has(nr uintptr, args ...uintptr) bool {
	var a [3]uintptr
	copy(a[:], args)
	_, _, errno := unix.RawSyscall(nr, a[0], a[1], a[2])
	return errno != unix.ENOSYS
}

var architecture = runtime.GOARCH
