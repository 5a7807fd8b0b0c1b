// Package seccomp owns the system call filters of containers: Docker's profiles, a compiler from a profile to a compact
// BPF program, and a cache of compiled programs.
//
// The compiler makes a binary search tree over ranges of system call numbers, where libseccomp makes a list: a default
// profile takes about 8 comparisons a call instead of hundreds, and the kernel, which runs the program once for every
// number when it is loaded (to remember the calls that are always allowed), loads it several times faster.
package seccomp

import (
	"errors"
	"fmt"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ErrUnsupported says that a profile asks for something that conex can't give; the error's text names it.
var ErrUnsupported = errors.New("not supported")

// Default returns Docker's default profile for a container with these capabilities ("CAP_CHOWN" form), resolved for this
// machine's architecture and kernel. Building it takes about 50 µs; CachedDefault is the way around that.
func Default(capNames []string) *specs.LinuxSeccomp {
	p, err := seccomp.GetDefaultProfile(specFor(capNames))
	if err != nil {
		// The only cause is an uname(2) whose release isn't "<number>.<number>…", which no kernel returns. Going on without
		// a filter would be worse than stopping.
		panic(fmt.Sprintf("resolve seccomp's default profile: %v", err))
	}
	return p
}

// Parse resolves a user's profile in Docker's JSON format (a superset of the OCI format) for this machine and these capabilities, and checks it
// as far as Compile would. It returns nil without an error for a profile that says nothing ("{}"), which means no filter.
func Parse(profile []byte, capNames []string) (*specs.LinuxSeccomp, error) {
	p, err := seccomp.LoadProfile(string(profile), specFor(capNames))
	if err != nil {
		return nil, err
	}
	if _, err := Compile(p); err != nil {
		return nil, err
	}
	return p, nil
}

// specFor wraps capabilities in the little of a spec that the profiles module looks at.
func specFor(capNames []string) *specs.Spec {
	return &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: capNames}}}
}

// Flags returns the flags of seccomp(2)'s SECCOMP_SET_MODE_FILTER that a profile asks for. A profile that doesn't mention
// flags gets SECCOMP_FILTER_FLAG_SPEC_ALLOW, as runc does: without it, kernels before 5.16 switch speculation off for
// the whole container, which costs up to a third of its speed.
func Flags(p *specs.LinuxSeccomp) (uint, error) {
	if p == nil {
		return 0, nil
	}
	if p.Flags == nil {
		return unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, nil
	}
	var flags uint
	for _, f := range p.Flags {
		switch f {
		case specs.LinuxSeccompFlagLog:
			flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case "SECCOMP_FILTER_FLAG_TSYNC":
			// The filter is installed by the only thread of a process that then calls execve: nothing to synchronise.
		default:
			return 0, fmt.Errorf("seccomp flag %s: %w", f, ErrUnsupported)
		}
	}
	return flags, nil
}
