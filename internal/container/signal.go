package container

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// realtimeMin and realtimeMax are what C libraries leave of the kernel's real-time signals, 32 to 64.
const (
	realtimeMin = 34
	realtimeMax = 64
)

// ParseSignal reads a signal as Docker takes it: a number, "TERM" or "SIGTERM" in any case, "RTMIN+3".
func ParseSignal(s string) (syscall.Signal, error) {
	bad := fmt.Errorf("invalid signal: %s", s)
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > realtimeMax {
			return 0, bad
		}
		return syscall.Signal(n), nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	base, rest := 0, ""
	switch {
	case strings.HasPrefix(name, "RTMIN"):
		base, rest = realtimeMin, name[len("RTMIN"):]
	case strings.HasPrefix(name, "RTMAX"):
		base, rest = realtimeMax, name[len("RTMAX"):]
	default:
		if n := unix.SignalNum("SIG" + name); n != 0 {
			return n, nil
		}
		return 0, bad
	}
	n := 0
	if rest != "" {
		var err error
		if n, err = strconv.Atoi(rest); err != nil || rest[0] != '+' && rest[0] != '-' {
			return 0, bad
		}
	}
	if base += n; base < realtimeMin || base > realtimeMax {
		return 0, bad
	}
	return syscall.Signal(base), nil
}

// StopSignal is what `stop` sends first: the image's or user's STOPSIGNAL, or SIGTERM.
func (r *Record) StopSignal() syscall.Signal {
	if r.Config.StopSignal != "" {
		if s, err := ParseSignal(r.Config.StopSignal); err == nil {
			return s
		}
	}
	return unix.SIGTERM
}

// StopTimeout is how many seconds `stop` waits before SIGKILL, when the user doesn't say; negative means for ever.
func (r *Record) StopTimeout() int {
	if r.Config.StopTimeout != nil {
		return *r.Config.StopTimeout
	}
	return DefaultStopTimeout
}

// DefaultStopTimeout is Docker's, in seconds.
const DefaultStopTimeout = 10
