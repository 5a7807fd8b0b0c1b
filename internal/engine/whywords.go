package engine

import (
	"fmt"
	"strings"
	"syscall"
	"time"

	"conex/internal/container"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// signalWords say what it means that a signal ended a process, for those that say something.
var signalWords = map[syscall.Signal]string{
	unix.SIGABRT: "the program gave itself up, as by abort() or a failed assertion",
	unix.SIGSEGV: "it used memory that is not its own: a fault in the program, or in a library of it",
	unix.SIGBUS:  "it used memory that could not be had: a file cut short under a mapping, or /dev/shm full (--shm-size)",
	unix.SIGILL:  "it has an instruction that this processor doesn't know: it may be built for another one",
	unix.SIGFPE:  "it divided by zero or the like",
	unix.SIGSYS:  "it made a system call that its seccomp profile answers with death",
	unix.SIGTRAP: "it hit a breakpoint that nobody was there to handle",
	unix.SIGPIPE: "it wrote to a pipe or connection that nobody reads any more",
	unix.SIGXCPU: "it used up the processor time of its ulimit (cpu)",
	unix.SIGXFSZ: "it wrote a file larger than its ulimit (fsize)",
	unix.SIGTERM: "it was asked to end",
	unix.SIGINT:  "it was interrupted, as by Ctrl-C",
	unix.SIGHUP:  "its terminal went away, or it was told so",
	unix.SIGKILL: "nothing can catch or refuse that",
}

// signalName is a signal as people write it.
func signalName(n int) string {
	if name := unix.SignalName(syscall.Signal(n)); name != "" {
		return fmt.Sprintf("%s (%d)", name, n)
	}
	return fmt.Sprintf("signal %d", n)
}

// exitWords explain how a process ended, by its exit code and signal, as a sentence's end. ran tells a command that ran from one that
// could not be started.
func exitWords(x *container.Exit, ran bool) string {
	if x.Signal != 0 {
		s := fmt.Sprintf("%s ended it: exit code %d", signalName(x.Signal), x.Code)
		if w := signalWords[syscall.Signal(x.Signal)]; w != "" {
			s += "; " + w
		}
		return s
	}
	if x.Error == container.Rebooted {
		return fmt.Sprintf("nobody saw how, so its exit code is %d", x.Code)
	}
	said := fmt.Sprintf("it ended by itself with exit code %d", x.Code)
	switch {
	case x.Code == 128 && !ran:
		return "before its command was executed"
	case x.Code == 0:
		return said + ", which means success"
	case x.Code == 125 && !ran:
		return "conex could not start it"
	case x.Code == 126 && ran:
		return said + ": a shell says so when a command was found and could not be executed (no permission, a folder, a wrong format)"
	case x.Code == 127 && ran:
		return said + ": a shell says so when it found no such command"
	case x.Code == 126:
		return "its command was found and could not be executed (exit code 126)"
	case x.Code == 127:
		return "its command was not found in the image (exit code 127)"
	case x.Code > 128 && x.Code <= 128+64:
		n := x.Code - 128
		s := said + ": shells say so of a command that " + signalName(n) + " ended"
		if w := signalWords[syscall.Signal(n)]; w != "" {
			s += " (" + w + ")"
		}
		return s
	case x.Code == 255:
		return said + ", which is often -1: a failure without a number"
	case x.Code >= 64 && x.Code <= 78:
		return said + sysexits[x.Code-64]
	default:
		return said + "; what that means is the program's to say"
	}
}

// sysexits are the codes of BSD's sysexits.h, from 64 on.
var sysexits = [...]string{
	" (wrong usage, by the convention of sysexits)", " (wrong input data, by sysexits)", " (no input, by sysexits)", " (unknown user, by sysexits)",
	" (unknown host, by sysexits)", " (service unavailable, by sysexits)", " (internal fault, by sysexits)", " (the system failed, by sysexits)",
	" (a system file is missing, by sysexits)", " (can't create output, by sysexits)", " (input or output failed, by sysexits)",
	" (try again later, by sysexits)", " (protocol error, by sysexits)", " (no permission, by sysexits)", " (wrong configuration, by sysexits)",
}

// enderWords say who ended a run, as a sentence.
func enderWords(b *container.Ender) string {
	who := ""
	if b.Pid != 0 {
		from := b.Process
		if b.Parent != "" {
			from += ", started by " + b.Parent
		}
		who = fmt.Sprintf(" (process %d, %s, user %d)", b.Pid, from, b.UID)
	}
	var s string
	switch b.Command {
	case container.ByHealth:
		switch {
		case b.Signal == int(unix.SIGKILL):
			s = "Its failed health check had it killed, as --health-on-failure says"
		default:
			s = "Its failed health check had it stopped, as --health-on-failure says"
		}
	case container.ByShutdown:
		s = "The machine was going down, or somebody told its monitor to end: it was stopped"
	case container.ByAttached:
		s = fmt.Sprintf("An attached command%s passed %s on, as of a Ctrl-C", who, signalName(b.Signal))
	case "kill":
		s = fmt.Sprintf("`conex kill`%s sent %s", who, signalName(b.Signal))
	default:
		s = fmt.Sprintf("`conex %s`%s sent %s", strings.TrimSpace(b.Command), who, signalName(b.Signal))
		if b.Command == "rm" {
			s = fmt.Sprintf("`conex rm -f`%s killed it", who)
		}
	}
	if b.Forced {
		s += fmt.Sprintf("; it did not end within %d s, so SIGKILL followed (-t and --stop-timeout set that time)", b.Timeout)
	}
	return s + "."
}

// spoken is a duration inside a sentence: "less than a second", "about an hour", "3 weeks".
func spoken(d time.Duration) string {
	s := units.HumanDuration(max(0, d))
	return strings.ToLower(s[:1]) + s[1:]
}
