package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"conex/internal/linux/nsfork"
	"conex/internal/linux/pidfd"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxHookOutput bounds what an error shows of a hook's output, in bytes.
const maxHookOutput = 4096

// RunHooks runs hooks in their order, with state on their standard input, and ends with the first that fails. They run in the
// namespaces of the calling thread.
func RunHooks(kind string, hooks []specs.Hook, state *specs.State) error {
	if len(hooks) == 0 {
		return nil
	}
	data, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("state for %s hooks: %w", kind, err)
	}
	for i, h := range hooks {
		if err := runHook(h, data, state.Bundle); err != nil {
			return fmt.Errorf("%s hook #%d %s: %w", kind, i, h.Path, err)
		}
	}
	return nil
}

// RunHooksIn runs hooks inside a container as process p would be: its user, capabilities and filter.
func RunHooksIn(c Container, p *specs.Process, hooks []specs.Hook, state *specs.State) error {
	data, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("state for hooks: %w", err)
	}
	for i, h := range hooks {
		err := hookIO(data, func(in, out *os.File) error {
			q := *p
			q.Terminal, q.ConsoleSize, q.Args, q.Env = false, nil, hookArgs(h), h.Env
			proc, err := c.Exec(context.Background(), &ExecConfig{Path: h.Path, Process: &q, Stdio: [3]*os.File{in, out, out}, Exact: true})
			if err != nil {
				return err
			}
			return waitHook(h, proc, out)
		})
		if err != nil {
			return fmt.Errorf("startContainer hook #%d %s: %w", i, h.Path, err)
		}
	}
	return nil
}

// hookIO makes a hook's input and output: files of memory, not pipes, so that a hook that leaves a process behind, or does not read,
// holds nobody up.
func hookIO(state []byte, run func(in, out *os.File) error) error {
	in, err := memory(state)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := memory(nil)
	if err != nil {
		return err
	}
	defer out.Close()
	return run(in, out)
}

func hookArgs(h specs.Hook) []string {
	if len(h.Args) == 0 {
		return []string{h.Path}
	}
	return h.Args
}

func runHook(h specs.Hook, state []byte, dir string) error {
	env := h.Env
	if env == nil {
		env = os.Environ()
	}
	args := hookArgs(h)
	if err := checkStrings(&specs.Process{Args: append([]string{h.Path}, args...), Env: env}); err != nil {
		return err
	}
	return hookIO(state, func(in, out *os.File) error {
		var prog nsfork.Program
		prog.Call("set standard input", unix.SYS_DUP3, in, 0, 0)
		prog.Call("set standard output", unix.SYS_DUP3, out, 1, 0)
		prog.Call("set standard error", unix.SYS_DUP3, out, 2, 0)
		prog.CloseOthers(3)
		unblockSignals(&prog)
		prog.Try("chdir", unix.SYS_CHDIR, dir)
		prog.Exec(h.Path, args, env)
		pid, fd, err := prog.Start(nsfork.Attr{})
		if err != nil {
			return err
		}
		return waitHook(h, newProcess(pid, fd, nil), out)
	})
}

func waitHook(h specs.Hook, p Process, out *os.File) error {
	late := make(chan struct{})
	if h.Timeout != nil && *h.Timeout > 0 {
		t := time.AfterFunc(time.Duration(*h.Timeout)*time.Second, func() {
			close(late)
			_ = p.Signal(unix.SIGKILL) // an error means that it has ended
		})
		defer t.Stop()
	}
	st, err := p.Wait()
	if err != nil {
		return err
	}
	select {
	case <-late:
		return fmt.Errorf("still running after %d seconds, killed", *h.Timeout)
	default:
	}
	if st.Code == 0 {
		return nil
	}
	text := make([]byte, maxHookOutput)
	n, _ := out.ReadAt(text, 0) // an error would hide the hook's own
	return fmt.Errorf("exit status %d: %q", st.Code, bytes.TrimSpace(text[:n]))
}

// memory returns an anonymous file with content, at its beginning.
func memory(content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("hook", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	if fd <= 2 { // where the hook's own streams go
		high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 10)
		unix.Close(fd)
		if err != nil {
			return nil, err
		}
		fd = high
	}
	f := os.NewFile(uintptr(fd), "hook")
	if len(content) == 0 {
		return f, nil
	}
	_, err = f.Write(content)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// creation runs the hooks of a container's creation while its first process, forked already, waits before its pivot_root.
//
//	thread: fork                                          child: reads one byte
//	        prestart, createRuntime: in our namespaces
//	        createContainer: in the container's
//	        writes the byte                                      pivot_root ... execve, or the hold
type creation struct {
	b           *box
	ready, done *os.File
}

// hooks prepares the child's wait; nil when there is nothing to wait for.
func (b *box) hooks(prog *nsfork.Program) (*creation, error) {
	h := b.cfg.Spec.Hooks
	if b.cfg.State == nil || h == nil || len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer) == 0 { //nolint:staticcheck // deprecated, and used by Docker
		return nil, nil
	}
	ready, done, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	// The child has an end for writing too, which must not keep it waiting when we die.
	prog.Call("close pipe", unix.SYS_CLOSE, done)
	prog.Await(ready)
	return &creation{b: b, ready: ready, done: done}, nil
}

func (c *creation) close() {
	c.ready.Close()
	c.done.Close()
}

// run is called on the container's thread when the child exists.
func (c *creation) run(pid int) error {
	h, state := c.b.cfg.Spec.Hooks, c.b.cfg.State(specs.StateCreating, pid)
	host := make(chan error, 1)
	go func() { // on another thread: those are in the namespaces that we were started in
		err := RunHooks("prestart", h.Prestart, state) //nolint:staticcheck // as above
		if err == nil {
			err = RunHooks("createRuntime", h.CreateRuntime, state)
		}
		host <- err
	}()
	if err := <-host; err != nil {
		return err
	}
	if len(h.CreateContainer) > 0 {
		if c.b.flags&unix.CLONE_NEWPID != 0 {
			fd, err := pidfd.Open(pid)
			if err == nil {
				err = unix.Setns(int(fd.Fd()), unix.CLONE_NEWPID) // for the children of this thread
				fd.Close()
			}
			if err != nil {
				return fmt.Errorf("enter the container for its hooks: %w", err)
			}
		}
		if err := RunHooks("createContainer", h.CreateContainer, state); err != nil {
			return err
		}
	}
	_, err := c.done.Write([]byte{0})
	return err
}
