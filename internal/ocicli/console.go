package ocicli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"conex/internal/linux/sigforward"
	"conex/internal/linux/tty"
	"conex/internal/runtime"

	"golang.org/x/sys/unix"
)

// maxSocketPath is what fits into a Unix socket's address.
const maxSocketPath = 107

// sendConsole sends a terminal's master to whoever listens on the socket, as one message with the descriptor.
func sendConsole(path string, console *os.File) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("console socket: %w", err)
	}
	defer unix.Close(fd)
	name := path
	if len(name) > maxSocketPath {
		dir, err := os.Open(filepath.Dir(path))
		if err != nil {
			return fmt.Errorf("console socket: %w", err)
		}
		defer dir.Close()
		name = fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: name}); err != nil {
		return fmt.Errorf("console socket %s: %w", path, err)
	}
	rc, err := console.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = rc.Control(func(master uintptr) {
		// Whoever gets it expects a blocking terminal; the flag is the open file's, and we are done with it.
		if serr = unix.SetNonblock(int(master), false); serr == nil {
			serr = unix.Sendmsg(fd, []byte("/dev/ptmx"), unix.UnixRights(int(master)), nil, 0)
		}
	})
	if err = errors.Join(err, serr); err != nil {
		return fmt.Errorf("send terminal to %s: %w", path, err)
	}
	return nil
}

// front is what a process in the foreground is given by this one: its signals, and the user's terminal for its own.
type front struct {
	signals chan os.Signal // nil where the kernel hands them on
	console *os.File
	saved   *tty.State
	stop    *os.File // closed to end the copy of the input
	stopped *os.File
	output  chan struct{}
}

// forwarded are the signals that go to the process in the foreground.
var forwarded = []syscall.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGCONT, unix.SIGALRM, unix.SIGWINCH,
	unix.SIGTTIN, unix.SIGTTOU,
}

// newFront begins; console is the process's terminal, nil when it has none or somebody else got it.
func newFront(p runtime.Process, console *os.File) (*front, error) {
	f := &front{console: console}
	if console == nil { // else sizes are of interest too
		fd, err := unix.PidfdOpen(p.Pid(), 0) // open until this program ends
		if err != nil {
			return nil, fmt.Errorf("forward signals: %w", err)
		}
		err = sigforward.To(fd, forwarded...)
		if err == nil || !errors.Is(err, errors.ErrUnsupported) {
			return f, err
		}
		unix.Close(fd)
	}
	f.signals = make(chan os.Signal, 16)
	for _, s := range forwarded {
		signal.Notify(f.signals, s)
	}
	if console != nil {
		if err := f.connect(); err != nil {
			f.end()
			return nil, err
		}
	}
	go func() { // ends with the process
		for s := range f.signals {
			if s == unix.SIGWINCH && f.console != nil {
				f.resize()
				continue
			}
			_ = p.Signal(s.(syscall.Signal)) // an error means that it has ended
		}
	}()
	return f, nil
}

// connect joins our terminal with the process's.
func (f *front) connect() error {
	var err error
	if tty.IsTerminal(0) {
		f.resize()
		if f.saved, err = tty.MakeRaw(0); err != nil {
			return err
		}
	}
	if f.stopped, f.stop, err = os.Pipe(); err != nil {
		return err
	}
	go func() { // ends when stop is closed, or with the input
		_ = tty.CopyUntil(f.console, os.Stdin, f.stopped) // the process goes on without input
	}()
	f.output = make(chan struct{})
	go func() { // ends with the last user of the terminal's other side
		defer close(f.output)
		_, _ = io.Copy(os.Stdout, f.console) // EIO is its end
	}()
	return nil
}

func (f *front) resize() {
	if s, err := tty.GetSize(0); err == nil {
		if rc, err := f.console.SyscallConn(); err == nil {
			_ = rc.Control(func(fd uintptr) { _ = tty.SetSize(int(fd), s) }) // it may be closed already
		}
	}
}

// wait returns when the process has ended and its terminal's output is written.
func (f *front) wait(p runtime.Process) (runtime.ExitStatus, error) {
	st, err := p.Wait()
	if f.output != nil {
		<-f.output
	}
	f.end()
	return st, err
}

// end gives our terminal back.
func (f *front) end() {
	if f.signals != nil {
		signal.Stop(f.signals)
	}
	if f.stop != nil {
		f.stop.Close()
	}
	if f.saved != nil {
		_ = tty.Restore(0, f.saved) // the terminal may be gone
	}
}
