package engine

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"conex/internal/build"
	"conex/internal/linux/tty"
	"conex/internal/runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// talk runs a container whose first process talks to c and ends with ctx, and returns its exit code. Nothing is left of it.
func talk(ctx context.Context, rt runtime.Runtime, cfg *runtime.Config, c *build.Console) (code int, err error) {
	var ends []*os.File // the process's
	closeEnds := func() {
		for _, f := range ends {
			f.Close()
		}
		ends = nil
	}
	defer closeEnds()
	var copying sync.WaitGroup
	if c.Terminal {
		cfg.Spec.Process.Terminal = true
		select {
		case sz := <-c.Sizes:
			cfg.Spec.Process.ConsoleSize = &specs.Box{Height: uint(sz.Rows), Width: uint(sz.Cols)}
		default:
		}
	} else {
		cfg.Stdio[0] = c.In
		for i, w := range []io.Writer{c.Out, c.Err} {
			f, ok := w.(*os.File)
			if !ok {
				r, theirs, err := os.Pipe()
				if err != nil {
					return 0, err
				}
				copying.Go(func() {
					_, _ = io.Copy(w, r) // a reader that has gone is no concern of the command's
					r.Close()
				})
				f, ends = theirs, append(ends, theirs)
			}
			cfg.Stdio[i+1] = f
		}
	}
	ct, err := rt.Create(ctx, cfg)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, ct.Delete()) }()
	p, err := ct.Start(ctx)
	closeEnds()
	if err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, func() { _ = p.Signal(unix.SIGKILL) }) // it has ended if this fails
	defer stop()
	if !c.Terminal {
		status, err := p.Wait()
		within(&copying)
		return status.Code, errors.Join(err, ctx.Err())
	}
	master := p.Console()
	defer master.Close()
	wakeR, wakeW, err := os.Pipe()
	if err != nil {
		return 0, errors.Join(err, p.Signal(unix.SIGKILL))
	}
	defer wakeR.Close()
	var shown, typed sync.WaitGroup
	shown.Go(func() { _, _ = io.Copy(c.Out, master) }) // ends with EIO, when nobody has the other side any more
	typed.Go(func() { _ = tty.CopyUntil(master, c.In, wakeR) })
	ended := make(chan struct{})
	typed.Go(func() {
		for {
			select {
			case sz := <-c.Sizes:
				if rc, err := master.SyscallConn(); err == nil {
					_ = rc.Control(func(fd uintptr) { _ = tty.SetSize(int(fd), sz) }) // a terminal that is gone needs no size
				}
			case <-ended:
				return
			}
		}
	})
	status, err := p.Wait()
	close(ended)
	wakeW.Close() // the copy of the keyboard ends, though nothing was typed
	typed.Wait()
	within(&shown)
	return status.Code, errors.Join(err, ctx.Err())
}

// within waits until what the command wrote has been passed on. What it left behind in a running container may hold its output for ever, so
// not longer than an exec does.
func within(copies *sync.WaitGroup) {
	done := make(chan struct{})
	go func() { // ends with the copies, at the latest with this process
		copies.Wait()
		close(done)
	}()
	t := time.NewTimer(2 * time.Second)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
}
