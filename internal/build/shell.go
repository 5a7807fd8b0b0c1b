package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"

	"conex/internal/layers"
	"conex/internal/linux/mount"
	"conex/internal/linux/tty"
	"conex/internal/safepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Console is what a shell in the place of a step talks to.
type Console struct {
	In       *os.File
	Out, Err io.Writer
	// Terminal gives the shell a terminal of its own, whose output all goes to Out. In is read as the keyboard; raw mode is the caller's.
	Terminal bool
	// Sizes are the terminal's, the first one at once. May be nil.
	Sizes <-chan tty.Size
}

// ErrNoShell says that a step's file system has none of the shells that were looked for.
var ErrNoShell = errors.New("there is no shell in the step's file system")

// Decision is what to do about a step that failed.
type Decision int

const (
	// Stop fails the build.
	Stop Decision = iota
	// Retry runs the step again on its files as they were.
	Retry
	// RetryKept runs it again with what the failed command and the shells have changed. Neither its result nor what stands on it is found
	// in the cache later.
	RetryKept
	// Continue takes the file system as it is for the step's result, with the same reservation.
	Continue
)

// Failure is a RUN step that failed. Its file system is as the command left it.
type Failure struct {
	*StepError
	x     *execution
	shell []string
}

// Shell runs a shell in the step's place, with its environment, mounts, user and working folder, and returns its exit code. shell is the
// one to use, "" for the best that there is. An ErrNoShell says that there is none.
func (f *Failure) Shell(ctx context.Context, shell string, c *Console) (int, error) {
	args, err := f.x.findShell(shell, f.shell)
	if err != nil {
		return 0, err
	}
	return f.x.talk(ctx, args, c)
}

// debug asks what to do about a step that failed with err until there is a decision. It returns err for Stop.
func (x *execution) debug(ctx context.Context, err error) (Decision, error) {
	if x.debugger == nil || ctx.Err() != nil {
		return Stop, err
	}
	x.debugger.turn.Lock() // one at a time: there is one terminal
	defer x.debugger.turn.Unlock()
	var exit *exitError
	var se *StepError
	if ctx.Err() != nil || !errors.As(err, &exit) || !errors.As(x.debugger.explain(err), &se) {
		return Stop, err
	}
	d, derr := x.debugger.ask(ctx, &Failure{StepError: se, x: x, shell: x.debugger.shell})
	switch {
	case ctx.Err() != nil:
		return Stop, ctx.Err()
	case derr != nil || d == Stop:
		return Stop, errors.Join(err, derr)
	}
	if d == Retry {
		if err := x.renew(); err != nil {
			return Stop, err
		}
	}
	return d, nil
}

// renew throws away what commands have changed.
func (x *execution) renew() error {
	if err := os.RemoveAll(x.upper); err != nil {
		return err
	}
	clear(x.points)
	return os.Mkdir(x.upper, 0o755)
}

// debugger is a build's --debug as one step sees it.
type debugger struct {
	turn    *sync.Mutex
	ask     func(context.Context, *Failure) (Decision, error)
	explain func(error) error // makes a StepError
	shell   []string          // the stage's SHELL
}

// findShell is the command line of a shell: the one given, else the stage's, bash or sh, whichever is there.
func (x *execution) findShell(given string, stage []string) ([]string, error) {
	root, err := mount.Overlay(mount.OverlayOptions{Lower: append([]string{x.upper}, x.lower...)})
	if err != nil {
		return nil, err
	}
	defer root.Close()
	there := func(p string) bool {
		st, err := safepath.Stat(root, p)
		return err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&0o111 != 0
	}
	if given != "" {
		if strings.Contains(given, "/") && !there(given) {
			return nil, fmt.Errorf("shell %s: %w", given, fs.ErrNotExist)
		}
		return []string{given}, nil
	}
	try := []string{"/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh", "/usr/bin/sh", "/bin/ash", "/busybox/sh", "/bin/busybox"}
	if len(stage) > 0 && stage[0] != "/bin/sh" && strings.HasPrefix(stage[0], "/") {
		try = append([]string{stage[0]}, try...)
	}
	i := slices.IndexFunc(try, there)
	if i < 0 {
		return nil, ErrNoShell
	}
	if strings.HasSuffix(try[i], "/busybox") {
		return []string{try[i], "sh"}, nil
	}
	return []string{try[i]}, nil
}

// talk runs a command that talks to c in the step's place.
func (x *execution) talk(ctx context.Context, args []string, c *Console) (int, error) {
	var code int
	var gone func() error
	var err error
	if c.Terminal {
		code, gone, err = x.onTerminal(ctx, args, c)
	} else {
		code, gone, err = x.onStreams(ctx, args, c)
	}
	if err != nil {
		return 0, err
	}
	return code, gone()
}

// onStreams gives the command the caller's files, or pipes to what is no file.
func (x *execution) onStreams(ctx context.Context, args []string, c *Console) (int, func() error, error) {
	cmd := &command{args: args, stdio: [3]*os.File{c.In}}
	var pipes sync.WaitGroup
	var ours []*os.File
	closeOurs := func() {
		for _, f := range ours {
			f.Close()
		}
		ours = nil
	}
	defer closeOurs()
	for i, w := range []io.Writer{c.Out, c.Err} {
		f, ok := w.(*os.File)
		if !ok {
			r, theirs, err := os.Pipe()
			if err != nil {
				return 0, nil, err
			}
			pipes.Go(func() {
				_, _ = io.Copy(w, r) // a reader that has gone is no concern of the command's
				r.Close()
			})
			f, ours = theirs, append(ours, theirs)
		}
		cmd.stdio[i+1] = f
	}
	cmd.started = closeOurs
	code, gone, err := x.command(ctx, cmd)
	closeOurs()
	pipes.Wait()
	return code, gone, err
}

// onTerminal gives the command a terminal and carries what is typed and shown.
func (x *execution) onTerminal(ctx context.Context, args []string, c *Console) (int, func() error, error) {
	cmd := &command{args: args, terminal: &specs.Box{}}
	if t := os.Getenv("TERM"); t != "" {
		cmd.env = []string{"TERM=" + t}
	}
	select {
	case sz := <-c.Sizes:
		cmd.terminal = &specs.Box{Height: uint(sz.Rows), Width: uint(sz.Cols)}
	default:
	}
	wakeR, wakeW, err := os.Pipe()
	if err != nil {
		return 0, nil, err
	}
	defer wakeR.Close()
	var shown, typed sync.WaitGroup
	var master *os.File
	cmd.attached = func(console *os.File) {
		master = console
		shown.Go(func() { _, _ = io.Copy(c.Out, master) }) // ends with EIO, when nobody has the other side any more
		typed.Go(func() { _ = tty.CopyUntil(master, c.In, wakeR) })
		typed.Go(func() { follow(master, c.Sizes, wakeR) })
	}
	cmd.ended = shown.Wait
	code, gone, err := x.command(ctx, cmd)
	wakeW.Close() // the copies of the keyboard and of sizes end, though nothing was typed
	typed.Wait()
	if master != nil {
		master.Close()
	}
	return code, gone, err
}

// follow gives a terminal its new sizes until stop is closed at its other end.
func follow(master *os.File, sizes <-chan tty.Size, stop *os.File) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = stop.Read(make([]byte, 1))
	}()
	for {
		select {
		case sz := <-sizes:
			if rc, err := master.SyscallConn(); err == nil {
				_ = rc.Control(func(fd uintptr) { _ = tty.SetSize(int(fd), sz) }) // a terminal that is gone needs no size
			}
		case <-ended:
			return
		}
	}
}

// ShellRequest asks for a command in the place of a step of an earlier build.
type ShellRequest struct {
	// Request gives what the step's mounts, network and privileges ask for.
	Request
	Build *BuildRecord
	Step  *StepRecord
	// Before shows the file system that the step began with; a step that failed has no other.
	Before bool
	// Args is the command; none is a shell, of the name Shell if that is set.
	Args    []string
	Shell   string
	Console Console
}

// Shell runs a command in the place of a step of an earlier build, and returns its exit code. What it changes is thrown away. The caller
// holds a lease that Layers claims for.
func (b *Builder) Shell(ctx context.Context, req ShellRequest) (code int, err error) {
	defer func() { err = errors.Join(err, b.finish()) }()
	if err := Settle(ctx, b.State, b.Networks); err != nil {
		return 0, err
	}
	x := &execution{b: b, req: &req.Request, gates: newGates(0), vertex: newJournal(nil, nil).vertex("", "shell"), platform: platform()}
	if x.grants, err = newGrants(&req.Request); err != nil {
		return 0, err
	}
	if err := x.recall(&req); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, x.close()) }()
	if err := x.open(ctx); err != nil {
		return 0, err
	}
	args := req.Args
	if len(args) == 0 {
		var stage []string
		if req.Step.Config != nil {
			stage = req.Step.Config.Shell
		}
		if args, err = x.findShell(req.Shell, stage); err != nil {
			return 0, err
		}
	}
	return x.talk(ctx, args, &req.Console)
}

// recall makes a step's place of its record.
func (x *execution) recall(req *ShellRequest) error {
	h := OpenHistory(x.b.Root)
	s := req.Step
	at := h.Layers
	if req.Before || !s.HasResult() {
		at = h.Below
	}
	ids, err := at(req.Build, s)
	if err != nil {
		return err
	}
	x.in = []result{{layers: ids}}
	if s.Kind == kindRun {
		if err := json.Unmarshal(s.Op, &x.op); err != nil {
			return fmt.Errorf("build %s: %s: %w", req.Build.ID, s.Name, err)
		}
		for i := range s.Inputs[min(1, len(s.Inputs)):] {
			ids, err := h.Input(req.Build, &s.Inputs[i+1])
			if err != nil {
				return err
			}
			x.in = append(x.in, result{layers: ids})
		}
		for _, m := range x.op.Mounts {
			if m.Input >= len(x.in) {
				return fmt.Errorf("build %s: %s: the record lacks an input", req.Build.ID, s.Name)
			}
		}
		x.op.Script, x.op.Args = "", nil
		if x.op.Security == "insecure" {
			err = x.grants.need(allowInsecure)
		} else if x.op.Network == "host" {
			err = x.grants.need(allowHostNetwork)
		}
	} else if c := s.Config; c != nil {
		x.op = runOp{Env: c.Env, Dir: c.Dir, User: c.User, Hosts: req.AddHosts, ShmSize: req.ShmSize, Ulimits: req.Ulimits}
	}
	if x.op.Dir == "" {
		x.op.Dir = "/"
	}
	for _, in := range x.in {
		if err == nil {
			err = x.claim(in)
		}
		if err != nil {
			return fmt.Errorf("build %s: %s: %w", req.Build.ID, firstLine(s.Name), err)
		}
	}
	return err
}

// claim keeps layers from sweeps, or says that they are gone.
func (x *execution) claim(r result) error {
	if err := x.b.Layers.Claim(r.layers...); err != nil {
		return err
	}
	for _, d := range r.layers {
		_, err := x.b.Layers.Stat(d)
		if errors.Is(err, layers.ErrNotFound) {
			return fmt.Errorf("%w: the cache has given the step's layers up: build it again", ErrNoBuild)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
