package engine

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"conex/internal/control"
	"conex/internal/disk"
	"conex/internal/linux/mount"

	"golang.org/x/sys/unix"
)

// startingMonitor is a monitor that is executed while its container is still being made: initialising a process takes as long as
// making a container, and there is more than one processor. It does nothing before it is told which container is its own, and ends
// when it is not told.
type startingMonitor struct {
	ready chan struct{} // closed when sock or err is set
	sock  *os.File
	err   error
	// restarts is the count of restarts that it goes on from.
	restarts int
}

// startMonitor executes a monitor. The caller either begins or abandons it.
func startMonitor() *startingMonitor {
	p := &startingMonitor{ready: make(chan struct{})}
	go func() { // ends as soon as the process is there
		defer close(p.ready)
		if p.sock, p.err = executeMonitor(); p.err != nil {
			p.err = fmt.Errorf("start the container's monitor: %w", p.err)
		}
	}()
	return p
}

// executeMonitor returns our end of the monitor's control.RequestFD.
func executeMonitor() (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(fds[1]), "monitor")
	defer theirs.Close()
	if err := unix.SetNonblock(fds[0], true); err != nil { // ours: waited for by the poller, not by a thread
		return nil, errors.Join(err, unix.Close(fds[0]))
	}
	ours := os.NewFile(uintptr(fds[0]), "monitor")
	// A monitor's memory counts once a container. For a second processor the runtime would keep half-used pages of its own of every size, a
	// third of a megabyte; what a monitor does at a time is one thing, and waiting. Its collector is eager, but only once it has calmed down.
	env := []string{"PATH=" + os.Getenv("PATH"), "GOMAXPROCS=1", "GOGC=400"}
	var stderr *os.File // closed, until it has its log
	if v := os.Getenv("GODEBUG"); v != "" {
		env = append(env, "GODEBUG="+v)
		stderr = os.Stderr
	}
	self, err := mount.ReadOnlySelf()
	if err != nil {
		ours.Close()
		return nil, err
	}
	defer self.Close()
	p, err := startSheltered(fmt.Sprintf("/proc/self/fd/%d", self.Fd()), []string{control.Name, control.Placeholder}, &os.ProcAttr{
		Dir: "/", Env: env, Sys: &syscall.SysProcAttr{Setsid: true},
		Files: []*os.File{control.RequestFD: theirs, 1: nil, 2: stderr, control.SelfFD: self},
	})
	if err != nil {
		ours.Close()
		return nil, err
	}
	go func() { // ends with the monitor; reaps it should it end before us
		_, _ = p.Wait()
	}()
	return ours, nil
}

// abandon ends a monitor that is not needed.
func (p *startingMonitor) abandon() {
	go func() { // ends as soon as the process is there
		<-p.ready
		if p.sock != nil {
			p.sock.Close()
		}
	}()
}

// begin tells the monitor what to run, hands it the container's lock, and reads its report. The stream is nil unless the request asks
// to attach. The monitor is used up, on an error too.
func (p *startingMonitor) begin(lock *disk.Lock, req control.StartRequest) (rep control.Report, s *control.Stream, err error) {
	<-p.ready
	if p.err != nil {
		return rep, nil, p.err
	}
	defer p.sock.Close()
	logf, err := os.OpenFile(filepath.Join(filepath.Dir(lock.File().Name()), "monitor.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return rep, nil, err
	}
	defer logf.Close()
	files := []*os.File{lock.Hand(), logf}
	if req.Attach {
		var theirs *os.File
		if s, theirs, err = attachPair(); err != nil {
			return rep, nil, err
		}
		defer theirs.Close()
		files = append(files, theirs)
	}
	if err = control.SendStart(p.sock, req, files); err == nil {
		var line []byte
		if line, err = bufio.NewReader(p.sock).ReadBytes('\n'); err == nil {
			err = json.Unmarshal(line, &rep)
		}
	}
	if err != nil {
		if s != nil {
			s.Close()
		}
		return rep, nil, fmt.Errorf("the container's monitor died while it started: %s", lastWords(logf.Name(), err))
	}
	return rep, s, nil
}

// attachPair makes the connection of a client that is attached from the start.
func attachPair() (s *control.Stream, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs = os.NewFile(uintptr(fds[1]), "attach")
	if s, err = control.NewStream(os.NewFile(uintptr(fds[0]), "attach")); err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return s, theirs, nil
}

// lastWords returns the end of a dead monitor's log, or else err's text.
func lastWords(path string, err error) string {
	f, oerr := os.Open(path)
	if oerr != nil {
		return err.Error()
	}
	defer f.Close()
	const tail = 2000
	if st, serr := f.Stat(); serr == nil && st.Size() > tail {
		if _, serr := f.Seek(-tail, io.SeekEnd); serr != nil {
			return err.Error()
		}
	}
	b, rerr := io.ReadAll(f)
	if rerr != nil || len(b) == 0 {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}
