package engine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/disk"
	"conex/internal/linux/mount"

	"golang.org/x/sys/unix"
)

// StartRequest starts a container that exists.
type StartRequest struct {
	Container string
	// Attach connects Streams to the output; AttachStdin the input too.
	Attach, AttachStdin bool
	Streams             Streams
}

// Start starts a container and, with Attach, stays until it ends or the user detaches. Starting one that runs is no error. The exit
// code is meaningful when attached: 0 after a detach.
func (e *Engine) Start(ctx context.Context, req StartRequest) (exitCode int, err error) {
	n, err := e.snapshot(ctx, req.Container)
	if err != nil {
		return 0, err
	}
	rec := n.Record
	if n.Alive() != nil {
		if req.Attach {
			return e.Attach(ctx, AttachRequest{Container: rec.ID, NoStdin: !req.AttachStdin, Streams: req.Streams})
		}
		return 0, nil
	}
	at := attachment{want: req.Attach, stdin: req.AttachStdin && rec.Config.OpenStdin}
	s, err := e.launch(ctx, rec, nil, at, &req.Streams)
	if errors.Is(err, container.ErrBusy) { // somebody else has started it
		if req.Attach {
			return e.Attach(ctx, AttachRequest{Container: rec.ID, NoStdin: !req.AttachStdin, Streams: req.Streams})
		}
		return 0, nil
	}
	if err != nil || s == nil {
		return 0, err
	}
	defer s.Close()
	exit, err := e.join(ctx, rec, s, at.stdin, rec.Config.Tty, &req.Streams)
	return exit.code, err
}

// attachment says how a container is attached from its start.
type attachment struct{ want, stdin bool }

// launch makes a monitor, which runs the container, and returns when its process is there. The stream is nil unless one is wanted.
// An error is an *ExitError with Docker's exit code; container.ErrBusy says that it runs already.
//
// It takes the container's lock unless the caller has it already, and releases it.
func (e *Engine) launch(ctx context.Context, rec *container.Record, lock *disk.Lock, at attachment, streams *Streams) (*control.Stream, error) {
	cs := e.Containers()
	held := lock != nil
	var err error
	if !held {
		if lock, err = cs.LockIdle(ctx, rec.ID); err != nil {
			return nil, err
		}
	}
	defer lock.Release() // ours; the monitor has the same lock by its descriptor
	if !held {
		if err := e.settleLocked(ctx, rec.ID); err != nil {
			return nil, err
		}
		// Removed while we waited?
		id := rec.ID
		if rec, err = cs.Load(id); err != nil {
			if errors.Is(err, container.ErrNotFound) {
				err = errors.Join(err, cs.RemoveRun(id)) // which our lock has made
			}
			return nil, classify(err)
		}
	}
	ls, err := e.Layers()
	if err != nil {
		return nil, err
	}
	req := control.StartRequest{
		Root: e.root.Path(), State: e.cfg.State, ID: rec.ID, Attach: at.want, AttachStdin: at.stdin,
		DNS: e.cfg.DNS, DNSSearch: e.cfg.DNSSearch, LogDriver: rec.HostConfig.LogConfig.Type, LogOptions: rec.HostConfig.LogConfig.Config,
	}
	if req.LogDriver == "" { // a record of before the driver was kept in it
		req.LogDriver, req.LogOptions = e.cfg.Log.Driver, e.cfg.Log.Options
	}
	if req.Lower, err = ls.Lower(ctx, rec.Layers); err != nil {
		return nil, &ExitError{125, err}
	}
	if at.want && rec.Config.Tty && streams.Resize != nil {
		select {
		case sz := <-streams.Resize:
			req.Rows, req.Cols = sz.Rows, sz.Cols
		default:
		}
	} else if hc := rec.HostConfig; hc.ConsoleSize[0] > 0 {
		req.Rows, req.Cols = uint16(hc.ConsoleSize[0]), uint16(hc.ConsoleSize[1])
	}
	rep, s, err := e.spawn(lock, req)
	if err != nil {
		return nil, &ExitError{125, err}
	}
	if rep.Error != "" {
		if s != nil {
			s.Close()
		}
		return nil, &ExitError{rep.ExitCode, startError(rep)}
	}
	return s, nil
}

// startError puts a failed start into words. Docker's own begin with a shim and a runtime that conex does not have.
func startError(rep control.Report) error {
	if rep.ExitCode == 126 || rep.ExitCode == 127 {
		return fmt.Errorf("unable to start container process: %s", rep.Error)
	}
	if rep.PortTaken {
		return &kindError{ErrConflict, fmt.Errorf("failed to set up container networking: %s", rep.Error)}
	}
	if strings.Contains(rep.Error, "not supported as upperdir") {
		return fmt.Errorf("%s: choose a data folder (--root) on another filesystem, such as ext4, xfs, btrfs or tmpfs", rep.Error)
	}
	if strings.Contains(rep.Error, ": attach mount ") && (strings.HasSuffix(rep.Error, syscall.EINVAL.Error()) || strings.HasSuffix(rep.Error, syscall.ENOTDIR.Error())) {
		return fmt.Errorf("%s: is it a folder mounted onto a file, or a file onto a folder?", rep.Error)
	}
	return errors.New(rep.Error)
}

// spawn executes the monitor and reads its report.
func (e *Engine) spawn(lock *disk.Lock, req control.StartRequest) (rep control.Report, s *control.Stream, err error) {
	in, reqw, err := os.Pipe()
	if err != nil {
		return rep, nil, err
	}
	defer reqw.Close()
	repr, repw, err := os.Pipe()
	if err != nil {
		in.Close()
		return rep, nil, err
	}
	defer repr.Close()
	run := filepath.Dir(lock.File().Name())
	logf, err := os.OpenFile(filepath.Join(run, "monitor.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		in.Close()
		repw.Close()
		return rep, nil, err
	}
	files := []*os.File{in, logf, logf, control.ReportFD: repw, control.LockFD: lock.File(), control.AttachFD: nil, control.SelfFD: nil}
	own := []*os.File{in, repw, logf}
	if req.Attach {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			closeAll(own)
			return rep, nil, err
		}
		theirs := os.NewFile(uintptr(fds[1]), "attach")
		own = append(own, theirs)
		files[control.AttachFD] = theirs
		if s, err = control.NewStream(os.NewFile(uintptr(fds[0]), "attach")); err != nil {
			closeAll(own)
			return rep, nil, err
		}
	}
	// Few threads and an eager collector: a monitor's memory counts once a container.
	env := []string{"PATH=" + os.Getenv("PATH"), "GOMAXPROCS=2", "GOGC=25"}
	if v := os.Getenv("GODEBUG"); v != "" {
		env = append(env, "GODEBUG="+v)
	}
	self, err := mount.ReadOnlySelf()
	if err != nil {
		closeAll(own)
		if s != nil {
			s.Close()
		}
		return rep, nil, fmt.Errorf("start the container's monitor: %w", err)
	}
	own = append(own, self)
	files[control.SelfFD] = self
	p, err := os.StartProcess(fmt.Sprintf("/proc/self/fd/%d", self.Fd()), []string{control.Name, req.ID[:12]}, &os.ProcAttr{
		Dir: "/", Env: env, Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	closeAll(own)
	if err != nil {
		if s != nil {
			s.Close()
		}
		return rep, nil, fmt.Errorf("start the container's monitor: %w", err)
	}
	go func() { // ends with the monitor; reaps it should it end before us
		_, _ = p.Wait()
	}()
	err = json.NewEncoder(reqw).Encode(req)
	if cerr := reqw.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		var line []byte
		line, err = bufio.NewReader(repr).ReadBytes('\n')
		if err == nil {
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

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
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
