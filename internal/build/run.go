package build

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"conex/internal/disk"
	"conex/internal/dockerfile"
	"conex/internal/network"
	"conex/internal/ocispec"
	"conex/internal/runtime"
	"conex/internal/undo"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// runOp is what RUN says; with the layers below it is all that its result may depend on.
type runOp struct {
	Args     []string  `json:"args,omitempty"`
	Script   string    `json:"script,omitempty"`
	Env      []string  `json:"env,omitempty"`
	Dir      string    `json:"dir"`
	User     string    `json:"user,omitempty"`
	Network  string    `json:"network,omitempty"`
	Security string    `json:"security,omitempty"`
	Mounts   []mountOp `json:"mounts,omitempty"`
	// Hostname, Hosts, ShmSize and Ulimits are the command line's.
	Hostname string              `json:"hostname,omitempty"`
	Hosts    []string            `json:"hosts,omitempty"`
	ShmSize  int64               `json:"shmSize,omitempty"`
	Ulimits  []specs.POSIXRlimit `json:"ulimits,omitempty"`
}

// hostname is what RUN steps see; the same in all, so that it can't make results differ.
const hostname = "build"

// planRun makes the node of a RUN and returns its history entry.
func (p *planner) planRun(ctx context.Context, n *node, s *stage, r *dockerfile.Run) (string, error) {
	op := runOp{
		Script: r.Script, Dir: s.cfg.workdir(), User: s.cfg.image.Config.User,
		Hosts: p.req.AddHosts, ShmSize: p.req.ShmSize, Ulimits: p.req.Ulimits,
	}
	if h := p.req.BuildArgs["BUILDKIT_SANDBOX_HOSTNAME"]; h != nil && *h != hostname {
		op.Hostname = *h
	}
	if err := p.entitle(&op, r); err != nil {
		return "", err
	}
	scriptName := path.Base("/" + r.ScriptName)
	switch {
	case r.Script != "":
		op.Args = s.cfg.withShell(dockerfile.CommandLine{Args: []string{"/dev/pipes/" + scriptName}, Shell: true}) // as in BuildKit
	default:
		op.Args = s.cfg.withShell(r.CommandLine)
	}
	if len(op.Args) == 0 {
		return "", errors.New("RUN needs a command")
	}
	var shown []string
	for _, a := range s.args {
		v, ok := s.vars.Get(a.Key)
		if !ok && a.Value != nil {
			v = *a.Value
		}
		shown = append(shown, a.Key+"="+v) // of one without a value too, as in Docker
	}
	op.Env = s.env()
	for _, m := range r.Mounts {
		if err := p.planMount(ctx, n, s, &op, m); err != nil {
			return "", fmt.Errorf("RUN --mount=type=%s: %w", m.Type, err)
		}
	}
	n.kind, n.op = kindRun, op
	shell, byHand := s.cfg.image.Config.Shell, false
	n.run = func(ctx context.Context, n *node, in []result) (made, error) {
		x := &execution{
			b: p.b, req: p.req, grants: p.grants, op: op, in: in, vertex: n.vertex, script: scriptName, proxies: p.proxies, platform: s.platform,
			gates: p.gates, imports: p.imports,
		}
		if p.req.Debug != nil {
			x.debugger = &debugger{
				turn: &p.debugging, ask: p.req.Debug, shell: shell,
				explain: func(err error) error { return stepError(p.file, n.step, n.title, err) },
			}
		}
		m, err := x.run(ctx)
		byHand = x.byHand
		return m, err
	}
	n.again = func() bool { return byHand }
	created := "RUN "
	if len(shown) > 0 {
		created += fmt.Sprintf("|%d %s ", len(shown), strings.Join(shown, " "))
	}
	return created + strings.Join(op.Args, " "), nil
}

// entitle decides on a RUN's network, privileges and devices.
func (p *planner) entitle(op *runOp, r *dockerfile.Run) error {
	if op.Network = r.Network; op.Network == "default" && p.req.Network != "default" {
		op.Network = p.req.Network
	}
	switch op.Network {
	case "default":
		op.Network = ""
	case "host":
		if err := p.grants.need(allowHostNetwork); err != nil {
			return fmt.Errorf("RUN --network=host: %w", err)
		}
	}
	if r.Security == "insecure" {
		if err := p.grants.need(allowInsecure); err != nil {
			return fmt.Errorf("RUN --security=insecure: %w", err)
		}
		op.Security = r.Security
	}
	for _, d := range r.Devices {
		// No device is known here, so one that need not be there is not.
		if d.Required {
			return fmt.Errorf("RUN --device=%s: required device %q is not registered, and CDI devices are %w", d.Name, d.Name, ErrUnsupported)
		}
		if describesDevices("/etc/cdi", "/var/run/cdi") {
			p.journal.emit(Event{Kind: Warning, Text: fmt.Sprintf("RUN --device=%s: CDI devices are %v: the step runs without it", d.Name, ErrUnsupported)})
		}
	}
	return nil
}

// describesDevices reports whether one of the folders has a CDI specification.
func describesDevices(dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(dir string) bool {
		names, err := os.ReadDir(dir)
		return err == nil && slices.ContainsFunc(names, func(e os.DirEntry) bool {
			return slices.Contains([]string{".json", ".yaml", ".yml"}, filepath.Ext(e.Name()))
		})
	})
}

// execution is one RUN on its way: a place made of the layers below and a folder that takes the changes. Commands run in it one after
// another.
type execution struct {
	b        *Builder
	req      *Request
	grants   *grants
	op       runOp
	in       []result
	vertex   *vertex
	script   string
	proxies  []string
	platform ocispec.Platform
	gates    *gates
	imports  *importer
	debugger *debugger // nil without --debug

	id    string
	owner *running
	stage *disk.Stage
	// dir is the staging folder, lower the layers, upper what takes the changes.
	dir   string
	lower []string
	upper string
	works int
	// waited is how long commands waited for others before they began.
	waited time.Duration
	// byHand says that a person decided what the step's result is.
	byHand bool
	// points are where mounts lay, by path without a leading slash.
	points map[string]bool
}

// run executes the command over the layers and turns what it changed into a new one.
func (x *execution) run(ctx context.Context) (_ made, err error) {
	if err := x.open(ctx); err != nil {
		return made{}, errors.Join(err, x.close())
	}
	closing := x.close
	defer func() { err = errors.Join(err, closing()) }()
	gone, err := x.step(ctx)
	for err != nil {
		d, derr := x.debug(ctx, err)
		if derr != nil {
			return made{}, derr
		}
		if x.byHand = d != Retry; x.byHand {
			x.vertex.output("what a person changed here is part of the step: it is not cached\n", true)
		}
		if d == Continue {
			gone, err = func() error { return nil }, nil
			break
		}
		gone, err = x.step(ctx)
	}
	// The process is dead, so nobody writes to upper any more: the layer is made while the kernel takes the rest down.
	closing = func() error {
		x.b.background(func() error { return errors.Join(gone(), x.close()) })
		return nil
	}
	return x.layer(ctx)
}

// layer is what the commands have changed.
func (x *execution) layer(ctx context.Context) (made, error) {
	leave, err := x.gates.work.enter(ctx)
	if err != nil {
		return made{}, err
	}
	defer leave()
	info, err := x.b.Layers.WriteUpper(ctx, x.upper, x.exclude())
	if err != nil {
		return made{}, err
	}
	m := made{when: time.Now(), waited: x.waited}
	if info.Entries > 0 {
		m.layer = info.DiffID
	}
	return m, nil
}

// open makes the place.
func (x *execution) open(ctx context.Context) (err error) {
	x.id = disk.RandomID()
	x.points = map[string]bool{}
	if x.owner, err = own(x.b.State, x.id, x.req.CgroupParent, x.b.SystemdCgroup); err != nil {
		return err
	}
	if x.stage, err = x.b.Root.Stage(); err != nil {
		return err
	}
	x.dir = x.stage.Dir
	x.upper = filepath.Join(x.dir, "upper")
	for _, d := range []string{"upper", "root", "empty", "files"} {
		if err := os.Mkdir(filepath.Join(x.dir, d), 0o755); err != nil {
			return err
		}
	}
	x.lower = []string{filepath.Join(x.dir, "empty")}
	if len(x.in[0].layers) > 0 {
		x.lower, err = x.b.Layers.Lower(ctx, x.in[0].layers)
	}
	return err
}

// close takes the place away.
func (x *execution) close() error {
	var err error
	if x.stage != nil {
		err = x.stage.Close()
	}
	if x.owner != nil {
		x.owner.release()
	}
	return err
}

// step runs the RUN's command and returns what takes down the rest of it.
func (x *execution) step(ctx context.Context) (func() error, error) {
	out, err := newOutput(x.vertex)
	if err != nil {
		return nil, err
	}
	code, gone, err := x.command(ctx, &command{
		args: x.op.Args, stdio: [3]*os.File{nil, out.stdout, out.stderr}, started: out.started, ended: out.wait,
	})
	var ee *runtime.ExecError
	switch {
	case errors.As(err, &ee):
		err = &exitError{strings.Join(x.op.Args, " "), ee.ExitCode(), x.foreign(ee).Error()}
	case err == nil && code != 0:
		err = errors.Join(&exitError{strings.Join(x.op.Args, " "), code, out.tail()}, gone())
	}
	if err != nil {
		out.abort()
		return nil, err
	}
	return func() error {
		out.abort()
		return gone()
	}, nil
}

// command is a process to run in the place.
type command struct {
	args  []string
	env   []string // in addition to the step's
	stdio [3]*os.File
	// terminal gives the process one, of the size; attached gets our side of it.
	terminal *specs.Box
	attached func(console *os.File)
	// started is called when the process has its streams, ended when it is dead; either may be nil.
	started, ended func()
}

// command runs a process with the step's mounts, network, environment and limits, until it ends. A cancelled ctx kills it. gone takes
// the container down; it is nil with an error.
func (x *execution) command(ctx context.Context, cmd *command) (code int, gone func() error, err error) {
	var undone undo.Stack
	defer undone.Run()
	m := &mounts{x: x}
	var held undo.Stack // until the command has ended
	defer held.Run()
	m.held = &held
	begun := time.Now()
	if m.caches, err = x.lockCaches(ctx, &held); err != nil {
		return 0, nil, err
	}
	leave, err := x.gates.runs.enter(ctx)
	if err != nil {
		return 0, nil, err
	}
	held.Add(leave)
	x.waited += time.Since(begun)
	if err := m.prepare(ctx); err != nil {
		return 0, nil, err
	}
	spec, err := x.spec(m)
	if err != nil {
		return 0, nil, err
	}
	spec.Process.Args = cmd.args
	spec.Process.Env = append(spec.Process.Env, cmd.env...)
	if spec.Process.Terminal = cmd.terminal != nil; cmd.terminal != nil {
		spec.Process.ConsoleSize = cmd.terminal
	}
	x.works++ // a work folder that a volatile mount has used can't be used again
	work := filepath.Join(x.dir, fmt.Sprintf("work.%d", x.works))
	if err := os.Mkdir(work, 0o755); err != nil {
		return 0, nil, err
	}
	c, err := x.b.Runtime.Create(ctx, &runtime.Config{
		ID: x.id, Spec: spec, User: x.op.User, Trees: m.trees, Stdio: cmd.stdio,
		RootFS:  runtime.RootFS{Lower: x.lower, Upper: x.upper, Work: work, Volatile: true},
		Scratch: filepath.Join(x.dir, "root"), SeccompCache: filepath.Join(x.b.State, "seccomp"), DefaultSeccomp: x.op.Security != "insecure",
		SystemdCgroup: x.owner.place.Unit != "",
		DieWithParent: true, // and with it what it was given to see
	})
	if err != nil {
		return 0, nil, err
	}
	// Only once nobody is left in there may address and cgroup go to others.
	down := func() error {
		err := c.Delete()
		if x.b.Networks != nil {
			err = errors.Join(err, x.b.Networks.Detach(context.WithoutCancel(ctx), x.id))
		}
		return err
	}
	undone.Add(func() { err = errors.Join(err, down()) })
	if err := x.connect(ctx, c); err != nil {
		return 0, nil, err
	}
	if code, err = x.wait(ctx, c, cmd, spec.Mounts); err != nil {
		return 0, nil, err
	}
	undone.Forget()
	return code, down, nil
}

// connect gives the container its network, while its file system is being mounted.
func (x *execution) connect(ctx context.Context, c runtime.Container) error {
	ns := c.NetNS()
	if x.b.Networks == nil || ns == nil {
		return nil
	}
	if x.op.Network == "none" {
		return x.b.Networks.Loopback(ns)
	}
	ep, err := x.b.Networks.Attach(ctx, network.AttachRequest{ContainerID: x.id, Name: "build", NetNS: ns, Hostname: x.hostname()})
	if err != nil || !x.wantsGateway() {
		return err
	}
	return x.writeHosts(ep.Gateway)
}

// wait starts the command and waits for its end; a cancelled ctx kills it. Where the mounts lie is found out meanwhile.
func (x *execution) wait(ctx context.Context, c runtime.Container, cmd *command, list []specs.Mount) (int, error) {
	proc, err := c.Start(ctx)
	if err != nil {
		return 0, err
	}
	if cmd.started != nil {
		cmd.started()
	}
	if cmd.attached != nil {
		cmd.attached(proc.Console())
	}
	ended, quiet := make(chan struct{}), make(chan struct{})
	go func() { // ends with the process, which is waited for below
		defer close(quiet)
		select {
		case <-ctx.Done():
			if err := proc.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
				x.vertex.output("kill: "+err.Error()+"\n", true)
			}
		case <-ended:
		}
	}()
	perr := x.findPoints(list)
	status, err := proc.Wait()
	close(ended)
	<-quiet
	if err = errors.Join(err, perr); err != nil {
		return 0, err
	}
	if cmd.ended != nil {
		cmd.ended()
	}
	return status.Code, ctx.Err()
}
